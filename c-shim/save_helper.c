/*
 * What libxl runs as its save helper ($LIBXL_SAVE_HELPER): the stock one with
 * our policy preloaded.  A program of its own, so that the preload reaches
 * the helper and nothing else that libxl starts.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    const char *stock = getenv("VNE_STOCK_SAVE_HELPER");
    const char *policy = getenv("VNE_SAVE_POLICY");

    if (!stock || !policy || argc < 1) {
        fprintf(stderr, "vne-save-helper: started by xl vne-snapshot only\n");
        return 1;
    }
    if (setenv("LD_PRELOAD", policy, 1)) {
        fprintf(stderr, "vne-save-helper: %s\n", strerror(errno));
        return 1;
    }

    execv(stock, argv);
    fprintf(stderr, "vne-save-helper: %s: %s\n", stock, strerror(errno));
    return 1;
}
