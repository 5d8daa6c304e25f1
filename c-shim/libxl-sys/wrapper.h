/* What the bindings are made from: the newest API of the installed Xen. */
#include <libxl.h>
#include <libxl_event.h>
#include <libxl_utils.h>
#include <libxlutil.h>
#include <xentoollog.h>
