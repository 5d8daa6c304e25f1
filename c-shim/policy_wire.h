/*
 * What the interposed save helper and the worker say to each other, over an
 * inherited SOCK_SEQPACKET socket.  Both ends are built together and run on
 * one machine, so this is host byte order and carries no version.
 * The Rust twin is plugin/domain/policy_wire.rs.
 */
#ifndef VNE_POLICY_WIRE_H
#define VNE_POLICY_WIRE_H

#include <stdint.h>

/* Environment variable with the number of the inherited socket. */
#define VNE_POLICY_FD_ENV "VNE_POLICY_FD"

/*
 * The rendezvous of a host's members, if there are several: a pipe of which
 * every helper has inherited the write end.  Each closes it when its guest has
 * stopped, and waits until all have, or for this long.  Else the first one's
 * last pages would take the processors that the others' guests need to stop, and
 * the cuts would lie apart.  A helper that dies closes it as well.
 */
#define VNE_RENDEZVOUS_FD_ENV "VNE_RENDEZVOUS_FD"
#define VNE_RENDEZVOUS_MS 100

enum vne_policy_kind {
    /* Between two rounds or before one: the worker answers a decision. */
    VNE_POLICY_ASK = 1,
    /* The suspend request is about to go to the guest.  No answer. */
    VNE_POLICY_SUSPENDING = 2,
    /* The guest has stopped (result 1) or has not (result 0).  No answer. */
    VNE_POLICY_SUSPENDED = 3,
    /* The stream is written (result 0) or not (result -1).  No answer. */
    VNE_POLICY_SAVED = 4,
};

struct vne_policy_msg {
    uint32_t kind;
    uint32_t iteration;
    int64_t dirty_count;    /* pages; -1 where not known, between rounds */
    uint64_t total_written; /* pages */
    uint64_t time_ns;       /* CLOCK_MONOTONIC */
    int32_t result;
    int32_t error;          /* errno that goes with a failed result */
};

/* The answer: one int32_t, a value of XGS_POLICY_* (xenguest.h). */

#endif
