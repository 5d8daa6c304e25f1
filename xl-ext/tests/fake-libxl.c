/*
 * Preloaded into the real xl so that it comes as far as its commands on a
 * machine that doesn't run Xen.  Commands that need a hypervisor crash or
 * fail.
 */

#include <stdlib.h>
#include <string.h>

#include <libxl.h>
#include <libxl_utils.h>

int libxl_ctx_alloc(libxl_ctx **pctx, int version, unsigned flags,
                    xentoollog_logger *lg)
{
    *pctx = calloc(1, 65536);
    return *pctx ? 0 : ERROR_NOMEM;
}

int libxl_ctx_free(libxl_ctx *ctx)
{
    free(ctx);
    return 0;
}

void libxl_childproc_setmode(libxl_ctx *ctx,
                             const libxl_childproc_hooks *hooks, void *user)
{
}

/* An empty xl.conf, wherever the real one is. */
int libxl_read_file_contents(libxl_ctx *ctx, const char *filename,
                             void **data_r, int *datalen_r)
{
    *data_r = strdup("");
    *datalen_r = 0;
    return 0;
}

const libxl_version_info *libxl_get_version_info(libxl_ctx *ctx)
{
    return NULL;
}

int libxl_cpu_bitmap_alloc(libxl_ctx *ctx, libxl_bitmap *map, int max_cpus)
{
    map->size = 1;
    map->map = calloc(1, 1);
    return map->map ? 0 : ERROR_NOMEM;
}

void libxl_bitmap_init(libxl_bitmap *map)
{
    memset(map, 0, sizeof(*map));
}

void libxl_bitmap_dispose(libxl_bitmap *map)
{
    free(map->map);
    libxl_bitmap_init(map);
}
