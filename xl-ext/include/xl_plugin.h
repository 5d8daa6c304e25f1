/*
 * xl_plugin.h: how a shared object adds commands to xl
 *
 * This program is free software; you can redistribute it and/or modify
 * it under the terms of the GNU Lesser General Public License as published
 * by the Free Software Foundation; version 2.1 only. with the special
 * exception on linking described in file LICENSE.
 *
 * This program is distributed in the hope that it will be useful,
 * but WITHOUT ANY WARRANTY; without even the implied warranty of
 * MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE.  See the
 * GNU Lesser General Public License for more details.
 */

/*
 * A plugin is a shared object in xl's plugin directory that exports the
 * two symbols declared at the end of this file.  See xl-plugins(7) for
 * where the directory is and what xl demands of the files in it.
 *
 * WHEN A PLUGIN IS LOADED
 *
 * Only when the user's command is none of xl's own, or for help.  For a
 * command, plugins are loaded in the order of their file names until one
 * has it; for `xl help' all of them are.  Loading a plugin goes
 *
 *    constructors -> xl_plugin_abi_version is read -> xl_plugin_init()
 *
 * and it may end there: for help no command is run.  So neither
 * constructors nor xl_plugin_init() may do anything that the user would
 * notice: no output, no thread, no child process, no signal handler, no
 * call on ctx.  They check that the plugin can run and give out a table.
 * A plugin stays loaded until the process ends.
 *
 * RUNNING A COMMAND
 *
 * xl calls the command's main() once, on its main thread, with argv[0]
 * the name of the command, argv[1] to argv[argc - 1] the words after it
 * on xl's command line and argv[argc] NULL, as main() of a program would
 * get them.  xl's own options, which stand before the command, aren't
 * among them; they are in the host table.
 *
 * getopt(3) is as xl's own commands find it: optind is 1 and opterr 0.
 * xl itself has parsed its options with it by then, and glibc keeps on
 * stopping at the first word that isn't an option because xl asked for
 * that; a command that wants to start afresh sets optind to 0.
 *
 * EXIT STATUS
 *
 * What main() returns is the exit status of xl, and means what it does
 * for xl's own commands:
 *
 *    0   success; also after -h or --help
 *    1   failure
 *    2   the arguments made no sense and nothing was done
 *
 * main() returns: it calls neither exit() nor anything that does.  No
 * exception, panic or longjmp() may leave xl_plugin_init() or main().
 *
 * THREADS, CHILD PROCESSES, SIGNALS
 *
 * xl has one thread, and calls a plugin from no other.  main() may start
 * threads, but joins them before it returns, since ctx and logger are
 * freed after that.
 *
 * ctx is set up with libxl_sigchld_owner_libxl: during an operation on
 * it libxl reaps every child of this process, its own or not (see
 * "Subprocess handling" in libxl_event.h).  A command with children of
 * its own does its libxl work in another process, or chooses another
 * mode with libxl_childproc_setmode().
 *
 * A child that doesn't exec leaves with _exit(), never exit() or by
 * returning, and may use no ctx but one that it allocated itself.
 *
 * xl calls nothing of its own that may exit() while a plugin's function
 * is running, and the host table holds no functions at all.  What libxl
 * does when a plugin calls it is another matter: it ends the process
 * when memory runs out.
 *
 * MEMORY
 *
 * Who allocates frees.  All that is in the host table belongs to xl and
 * lives as long as the process, with the exception of ctx and logger,
 * above.  All that xl_plugin_init() gives out belongs to the plugin,
 * and stays in place, unchanged, as long as the process lives: usually
 * it is static data.  Strings end in a NUL.
 *
 * VERSIONS
 *
 * The ABI has a version, major << 16 | minor.  A plugin of another major
 * version is refused, without calling it.  Within a major version
 * fields are added to the end of a structure and never changed, each
 * time with a new minor version, and every structure says how long its
 * maker thinks it is.  Each side reads what both know and takes the
 * rest for zero: so old plugins work with a new xl, and new plugins
 * with an old xl, if they look at host->struct_size before they use
 * what was added since 1.0.
 *
 * libxl isn't part of this: its ABI changes with each release of Xen.
 * A plugin that calls libxl compares host->xl_version with the release
 * that it was built for, and refuses if they differ.
 */

#ifndef XL_PLUGIN_H
#define XL_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define XL_PLUGIN_ABI_MAJOR 1
#define XL_PLUGIN_ABI_MINOR 0
#define XL_PLUGIN_ABI_VERSION \
    (XL_PLUGIN_ABI_MAJOR << 16 | XL_PLUGIN_ABI_MINOR)

/* Limits.  xl refuses what is beyond them, saying so. */
#define XL_PLUGIN_FILES_MAX     64    /* plugins in the directory */
#define XL_PLUGIN_COMMANDS_MAX  64    /* commands of one plugin */
#define XL_PLUGIN_NAME_MAX      32    /* bytes in a name or version */
#define XL_PLUGIN_LINE_MAX      255   /* bytes in desc and in an error */
#define XL_PLUGIN_TEXT_MAX      16384 /* bytes in usage and options */
#define XL_PLUGIN_STRIDE_MAX    4096  /* command_size */

struct libxl__ctx;        /* libxl_ctx, see libxl.h */
struct xentoollog_logger; /* xentoollog_logger, see xentoollog.h */

/* What xl tells the plugin. */
struct xl_plugin_host {
    /* sizeof(struct xl_plugin_host) of this xl. */
    size_t struct_size;
    /* XL_PLUGIN_ABI_VERSION of this xl. */
    uint32_t abi_version;
    /* Messages below this xentoollog_level aren't shown.  XTL_PROGRESS,
     * and one less for each -v. */
    int32_t minmsglevel;
    /* xl's other options, 0 or 1. */
    int32_t dryrun;          /* -N; only if the command can_dryrun */
    int32_t force;           /* -f */
    int32_t timestamps;      /* -T: date and pid on messages */
    int32_t progress_use_cr; /* -t: progress is rewritten in place even
                              * if stderr is no terminal */
    /* Release of Xen that this xl is from, as "4.17": also the version
     * of the libxl that made ctx, as in its soname. */
    const char *xl_version;
    /* Absolute path of the running xl, for starting it again.  Where
     * that can't be told it is one that works all the same. */
    const char *xl_path;
    /* Where Xen was configured to have things, no slash at the end. */
    const char *config_dir;      /* /etc/xen: xl.conf */
    const char *script_dir;      /* /etc/xen/scripts: hotplug scripts */
    const char *libexec_bin_dir; /* libxl-save-helper */
    const char *lib_dir;         /* /var/lib/xen: kept over a reboot */
    const char *run_dir;         /* /var/run/xen: gone after a reboot */
    const char *log_dir;         /* /var/log/xen */
    const char *lock_dir;        /* /var/lock */
    /* xl's libxl context and the logger that it writes its messages to.
     * Both are NULL when xl was started without a command, since only
     * help is printed then, and never when a command is run. */
    struct libxl__ctx *ctx;
    struct xentoollog_logger *logger;
    /* For xl_plugin_init(), and no longer: where to say in one line,
     * NUL-terminated, why it returns NULL.  Neither "xl:" nor the name
     * of the plugin belong into it: xl adds them. */
    char *error;
    size_t error_size;
};

/* A command that a plugin adds.  Nothing here may be NULL, unless said. */
struct xl_plugin_command {
    /* What the user types, in full: the commands of plugins can't be
     * abbreviated.  A lower-case letter, then lower-case letters, digits
     * and hyphens.  A command of xl's own, or how one can be
     * abbreviated, isn't allowed.  Of two plugins that have the same
     * command, the first by file name wins. */
    const char *name;
    /* See "Running a command" above. */
    int (*main)(int argc, char **argv);
    /* Does it understand host->dryrun?  If 0, xl refuses -N for it. */
    int32_t can_dryrun;
    /* Does it change anything?  If not 0, its help shows -f. */
    int32_t modifies;
    /* One line for `xl help', without a full stop.  NULL for a command
     * that is for internal use and that help shouldn't list. */
    const char *desc;
    /* What comes after the name in "Usage: xl NAME ..."; NULL if
     * nothing. */
    const char *usage;
    /* The text below "Options:", lines ending in a newline; NULL if
     * there are none. */
    const char *options;
};

/* What the plugin tells xl. */
struct xl_plugin {
    /* sizeof(struct xl_plugin) when the plugin was compiled. */
    size_t struct_size;
    /* For people: xl says them with -vvv. */
    const char *name;
    const char *version;
    /* How many commands there are, and sizeof(struct xl_plugin_command)
     * when the plugin was compiled. */
    size_t ncommands;
    size_t command_size;
    const struct xl_plugin_command *commands;
};

/* What a plugin exports. */

#define XL_PLUGIN_EXPORT __attribute__((visibility("default")))

/* XL_PLUGIN_ABI_VERSION when the plugin was compiled. */
extern const uint32_t xl_plugin_abi_version;

/* Called once.  NULL, with a reason in host->error, if the plugin can't
 * or won't work with this xl: its commands don't exist then. */
const struct xl_plugin *xl_plugin_init(const struct xl_plugin_host *host);

#ifdef __cplusplus
}
#endif

#endif /* XL_PLUGIN_H */

/*
 * Local variables:
 * mode: C
 * c-basic-offset: 4
 * indent-tabs-mode: nil
 * End:
 */
