/* What xl_plugin.c takes from xl, as in Xen's tools/xl/xl.h. */

#ifndef XL_H
#define XL_H

typedef enum { XTL_DEBUG = 1, XTL_PROGRESS = 4 } xentoollog_level;
typedef struct xentoollog_logger xentoollog_logger;
typedef struct xentoollog_logger_stdiostream xentoollog_logger_stdiostream;

struct cmd_spec {
    const char *cmd_name;
    int (*cmd_impl)(int argc, char **argv);
    int can_dryrun;
    int modifies;
    const char *cmd_desc;
    const char *cmd_usage;
    const char *cmd_option;
};

extern const struct cmd_spec cmd_table[];
extern const int cmdtable_len;

const struct cmd_spec *plugin_lookup(const char *s);
const struct cmd_spec *plugin_command(int n);

extern libxl_ctx *ctx;
extern xentoollog_logger_stdiostream *logger;
extern int dryrun_only;
extern int force_execution;
extern bool progress_use_cr;
extern bool timestamps;
extern xentoollog_level minmsglevel;

#endif /* XL_H */
