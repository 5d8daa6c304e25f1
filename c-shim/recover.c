#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <xenctrl.h>
#include <xenstore.h>

#include "recover.h"

int vne_cancel_suspend_request(uint32_t domid)
{
    char path[64];
    struct xs_handle *xs = NULL;
    xs_transaction_t t = XBT_NULL;
    char *state = NULL;
    unsigned int len;
    int rc = -1;

    xs = xs_open(0);
    if (!xs)
        goto out;
    snprintf(path, sizeof(path), "/local/domain/%u/control/shutdown", domid);

    /*
     * In a transaction, as libxl does it on time-out: the guest may be
     * answering at this very moment, and then the request stands.
     */
    for (;;) {
        t = xs_transaction_start(xs);
        if (t == XBT_NULL)
            goto out;

        free(state);
        state = xs_read(xs, t, path, &len);
        if (!state || strcmp(state, "suspend")) {
            rc = 0;
            goto out;
        }
        if (!xs_write(xs, t, path, "", 0))
            goto out;

        if (xs_transaction_end(xs, t, false)) {
            t = XBT_NULL;
            rc = 1;
            goto out;
        }
        t = XBT_NULL;
        if (errno != EAGAIN)
            goto out;
    }

 out:
    {
        int saved_errno = errno;

        if (t != XBT_NULL)
            xs_transaction_end(xs, t, true);
        free(state);
        if (xs)
            xs_close(xs);
        errno = saved_errno;
    }
    return rc;
}

int vne_logdirty_off(uint32_t domid)
{
    xc_interface *xch;
    int rc, saved_errno;

    xch = xc_interface_open(NULL, NULL, 0);
    if (!xch)
        return -1;
    rc = xc_shadow_control(xch, domid, XEN_DOMCTL_SHADOW_OP_OFF, NULL, 0);
    saved_errno = errno;
    xc_interface_close(xch);
    errno = saved_errno;

    return rc < 0 ? -1 : 0;
}
