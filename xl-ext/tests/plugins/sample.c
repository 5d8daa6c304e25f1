/*
 * The plugin that all test plugins are made from: each is this file with
 * some of the macros below set otherwise, see tests/run.
 */

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "xl_plugin.h"

#ifndef ABI
#define ABI XL_PLUGIN_ABI_VERSION
#endif
#ifndef VERSION
#define VERSION "0.1"
#endif
#ifndef COMMANDS
#define COMMANDS CMD("greet")
#endif
#ifndef COMMANDS_AT
#define COMMANDS_AT commands
#endif
#ifndef STRUCT_SIZE
#define STRUCT_SIZE sizeof(struct xl_plugin)
#endif
#ifndef NCOMMANDS
#define NCOMMANDS (sizeof(commands) / sizeof(commands[0]))
#endif
#ifndef COMMAND_SIZE
#define COMMAND_SIZE sizeof(struct xl_plugin_command)
#endif
#ifndef INIT
#define INIT
#endif

#define CMD(n, more...) \
    { .name = n, .main = main_greet, .desc = "Greet", ## more }

static const struct xl_plugin_host __attribute__((unused)) *host;

/* Says all that a command can know, and returns what -x asks for. */
static int __attribute__((unused)) main_greet(int argc, char **argv)
{
    int i, opt;
    int status = 0;

    printf("optind %d opterr %d\n", optind, opterr);
    for (i = 0; i < argc; i++)
        printf("argv[%d] %s\n", i, argv[i]);
    printf("argv[argc] %s\n", argv[argc] ? "?" : "NULL");
    while ((opt = getopt(argc, argv, "x:")) != -1)
        status = opt == 'x' ? atoi(optarg) : 2;
    printf("operands %d\n", argc - optind);
    return status;
}

static int __attribute__((unused)) main_host(int argc, char **argv)
{
    printf("struct_size %zu abi %x\n",
           host->struct_size, host->abi_version);
    printf("minmsglevel %d dryrun %d force %d timestamps %d cr %d\n",
           host->minmsglevel, host->dryrun, host->force, host->timestamps,
           host->progress_use_cr);
    printf("xl_version %s\n", host->xl_version);
    printf("xl_path %s\n", host->xl_path);
    printf("%s %s %s %s %s %s %s\n", host->config_dir, host->script_dir,
           host->libexec_bin_dir, host->lib_dir, host->run_dir,
           host->log_dir, host->lock_dir);
    printf("ctx %s logger %s\n", host->ctx ? "yes" : "NULL",
           host->logger ? "yes" : "NULL");
    return 0;
}

static const struct xl_plugin_command commands[] __attribute__((unused)) =
    { COMMANDS };

static const struct xl_plugin __attribute__((unused)) plugin = {
    .struct_size = STRUCT_SIZE,
    .name = "sample",
    .version = VERSION,
    .ncommands = NCOMMANDS,
    .command_size = COMMAND_SIZE,
    .commands = COMMANDS_AT,
};

/* A copy that ends where the mapped memory ends: who reads on, dies. */
static __attribute__((unused)) void *at_edge(const void *p, size_t size)
{
    size_t page = sysconf(_SC_PAGESIZE);
    char *map = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (map == MAP_FAILED || mprotect(map + page, page, PROT_NONE))
        abort();
    return memcpy(map + page - size, p, size);
}

/* NULL as the reason: as much as there is room for, and no NUL. */
static __attribute__((unused)) void *refuse(const char *why)
{
    if (why)
        snprintf(host->error, host->error_size, "%s", why);
    else
        memset(host->error, '0', host->error_size);
    return NULL;
}

#ifndef NO_ABI
XL_PLUGIN_EXPORT const uint32_t xl_plugin_abi_version = ABI;
#endif

#ifdef UNRESOLVED
void no_such_function(void);
#endif

#ifndef NO_INIT
XL_PLUGIN_EXPORT
const struct xl_plugin *xl_plugin_init(const struct xl_plugin_host *h)
{
    host = h;
    INIT;
#ifdef UNRESOLVED
    no_such_function();
#endif
#ifdef EDGE
    struct xl_plugin *p = at_edge(&plugin, sizeof(plugin));

    p->commands = at_edge(commands, sizeof(commands));
    return p;
#endif
    return &plugin;
}
#endif
