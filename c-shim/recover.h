/*
 * What to undo when a save helper or a worker was killed half way.
 * Each call is idempotent and safe on a domain that nothing happened to.
 */
#ifndef VNE_RECOVER_H
#define VNE_RECOVER_H

#include <stdint.h>

/*
 * Takes a suspend request back that the guest has not answered yet.
 * Returns 1 if there was one, 0 if there was none (never asked, or the guest
 * has answered and may be about to stop), -1 with errno set on failure.
 */
int vne_cancel_suspend_request(uint32_t domid);

/*
 * Switches log-dirty mode off, which a killed helper leaves on and which
 * costs the guest time.  Returns 0, or -1 with errno set.
 */
int vne_logdirty_off(uint32_t domid);

#endif
