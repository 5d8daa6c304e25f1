/* As much of libxl as xl_plugin.c knows: nothing. */
#include <stdbool.h>
#include <stdint.h>

typedef struct libxl__ctx libxl_ctx;
