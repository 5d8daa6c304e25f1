/*
 * Preloaded into libxl's stock save helper: takes xc_domain_save's place,
 * gives libxenguest our pre-copy policy, and says when the guest is asked to
 * suspend and when it has.  Everything else stays libxl's and libxenguest's.
 *
 * libxl never sets precopy_policy (Xen 4.17 to 4.20), so without this the
 * loop ends after five rounds at a moment of its own choosing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <xenctrl.h>
#include <xenforeignmemory.h>
#include <xenguest.h>

#include "policy_wire.h"

typedef int save_fn(xc_interface *, int, uint32_t, uint32_t,
                    struct save_callbacks *, xc_stream_type_t, int);

/* What libxl handed in; our own struct save_callbacks wraps it. */
static struct save_callbacks *libxl_callbacks;
static int policy_fd = -1;
static int rendezvous_fd = -1;
static bool guest_stands;

static int inherited(const char *env)
{
    const char *fd_string = getenv(env);
    char *end;
    long fd;

    if (!fd_string)
        return -1;
    errno = 0;
    fd = strtol(fd_string, &end, 10);
    if (errno || end == fd_string || *end || fd <= 2 || fd >= 65536)
        return -1;
    return fd;
}

/*
 * Before main(): the preload is for this process alone, and a helper whose
 * worker is gone must not ask a guest to suspend.
 */
__attribute__((constructor)) static void init(void)
{
    unsetenv("LD_PRELOAD");
    prctl(PR_SET_PDEATHSIG, SIGKILL);

    policy_fd = inherited(VNE_POLICY_FD_ENV);
    rendezvous_fd = inherited(VNE_RENDEZVOUS_FD_ENV);
}

static int tell(uint32_t kind, const struct precopy_stats *stats,
                int result, int error)
{
    struct timespec now;
    struct vne_policy_msg msg;
    ssize_t r;

    clock_gettime(CLOCK_MONOTONIC, &now);
    memset(&msg, 0, sizeof(msg));
    msg.kind = kind;
    msg.result = result;
    msg.error = error;
    msg.dirty_count = -1;
    msg.time_ns = now.tv_sec * 1000000000ULL + now.tv_nsec;
    if (stats) {
        msg.iteration = stats->iteration;
        msg.dirty_count = stats->dirty_count;
        msg.total_written = stats->total_written;
    }

    do
        r = send(policy_fd, &msg, sizeof(msg), MSG_NOSIGNAL);
    while (r < 0 && errno == EINTR);

    return r == sizeof(msg) ? 0 : -1;
}

/* A worker that can't be asked means abort: nothing has been suspended. */
static int policy(struct precopy_stats stats, void *data)
{
    int32_t decision;
    ssize_t r;

    if (tell(VNE_POLICY_ASK, &stats, 0, 0))
        return XGS_POLICY_ABORT;

    do
        r = recv(policy_fd, &decision, sizeof(decision), 0);
    while (r < 0 && errno == EINTR);

    if (r != sizeof(decision))
        return XGS_POLICY_ABORT;
    if (decision != XGS_POLICY_CONTINUE_PRECOPY &&
        decision != XGS_POLICY_STOP_AND_COPY)
        return XGS_POLICY_ABORT;
    return decision;
}

static void await_others(void)
{
    struct pollfd others = { .events = 0 };
    char path[32];

    if (rendezvous_fd < 0)
        return;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", rendezvous_fd);
    others.fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    close(rendezvous_fd);
    rendezvous_fd = -1;
    if (others.fd < 0)
        return;
    /* Nothing but the last writer's end ends this early. */
    poll(&others, 1, VNE_RENDEZVOUS_MS);
    close(others.fd);
}

static int suspend(void *data)
{
    int suspended;

    /* The worker is gone: failing here leaves the guest running. */
    if (tell(VNE_POLICY_SUSPENDING, NULL, 0, 0))
        return 0;
    suspended = libxl_callbacks->suspend(data);
    tell(VNE_POLICY_SUSPENDED, NULL, suspended, suspended ? 0 : errno);
    if (suspended) {
        guest_stands = true;
        await_others();
    }

    return suspended;
}

/*
 * In place of libxenforeignmemory's.  Unmapping the last pages takes as long
 * as a fourth of sending them, with the guest waiting for it; the process
 * is about to end, and then they go as well.
 */
int xenforeignmemory_unmap(xenforeignmemory_handle *fmem, void *addr,
                           size_t pages)
{
    static __typeof__(&xenforeignmemory_unmap) real;

    if (guest_stands)
        return 0;
    if (!real)
        real = (__typeof__(real))dlsym(RTLD_NEXT, "xenforeignmemory_unmap");
    if (!real) {
        errno = ENOSYS;
        return -1;
    }
    return real(fmem, addr, pages);
}

int xc_domain_save(xc_interface *xch, int io_fd, uint32_t dom,
                   uint32_t flags, struct save_callbacks *callbacks,
                   xc_stream_type_t stream_type, int recv_fd)
{
    struct save_callbacks ours = *callbacks;
    save_fn *real;
    int rc, saved_errno;

    real = (save_fn *)dlsym(RTLD_NEXT, "xc_domain_save");
    if (!real) {
        fprintf(stderr, "vne-save-policy: no xc_domain_save: %s\n",
                dlerror());
        errno = ENOSYS;
        return -1;
    }
    if (policy_fd < 0) {
        fprintf(stderr, "vne-save-policy: no socket in $%s\n",
                VNE_POLICY_FD_ENV);
        errno = EINVAL;
        return -1;
    }

    libxl_callbacks = callbacks;
    ours.precopy_policy = policy;
    ours.suspend = suspend;

    rc = real(xch, io_fd, dom, flags, &ours, stream_type, recv_fd);
    saved_errno = errno;
    tell(VNE_POLICY_SAVED, NULL, rc, rc ? saved_errno : 0);
    errno = saved_errno;

    return rc;
}
