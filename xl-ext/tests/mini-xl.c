/*
 * An xl without libxl: a few commands that do nothing, and around them
 * the same way from the command line to a command as in Xen's xl.c.  With
 * it the loader can be tested on any machine, and under the sanitizers.
 * tests/run runs the same cases on the real xl too if it can build that.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "libxl.h"
#include "xl.h"

libxl_ctx *ctx;
xentoollog_logger_stdiostream *logger;
int dryrun_only;
int force_execution;
bool progress_use_cr;
bool timestamps;
xentoollog_level minmsglevel = XTL_PROGRESS;

static int main_nothing(int argc, char **argv)
{
    return 0;
}

const struct cmd_spec cmd_table[] = {
    { "create", main_nothing, 1, 1, "Create a domain", "<ConfigFile>" },
    { "list", main_nothing, 0, 0, "List domains", "[Domain]" },
    { "pci-attach", main_nothing, 0, 1, "Attach a device", "<Domain>" },
    { "pause", main_nothing, 0, 1, "Pause a domain", "<Domain>" },
    { "vncviewer", main_nothing, 0, 0, "Attach to VNC", "<Domain>" },
};

const int cmdtable_len = sizeof(cmd_table) / sizeof(cmd_table[0]);

static const struct cmd_spec *cmdtable_lookup(const char *s)
{
    const struct cmd_spec *cmd = NULL;
    int i, count = 0;

    for (i = 0; i < cmdtable_len; i++) {
        if (!strncmp(s, cmd_table[i].cmd_name, strlen(s))) {
            cmd = &cmd_table[i];
            if (!strcmp(s, cmd->cmd_name))
                return cmd;
            count++;
        }
    }
    return (count == 1) ? cmd : NULL;
}

static void help_line(const struct cmd_spec *cmd)
{
    printf(" %-19s ", cmd->cmd_name);
    if (strlen(cmd->cmd_name) > 19)
        printf("\n %-19s ", "");
    printf("%s\n", cmd->cmd_desc);
}

static void help(const char *command)
{
    const struct cmd_spec *cmd;
    int i;

    if (!command || !strcmp(command, "help")) {
        printf("Usage xl [-vfNtT] <subcommand> [args]\n\n");
        printf("xl full list of subcommands:\n\n");
        for (i = 0; i < cmdtable_len; i++)
            help_line(&cmd_table[i]);
        for (i = 0; (cmd = plugin_command(i)); i++)
            help_line(cmd);
        return;
    }

    cmd = cmdtable_lookup(command);
    if (!cmd)
        cmd = plugin_lookup(command);
    if (!cmd) {
        printf("command \"%s\" not implemented\n", command);
        return;
    }
    printf("Usage: xl [-vtT%s%s] %s %s\n\n%s.\n\n",
           cmd->modifies ? "f" : "", cmd->can_dryrun ? "N" : "",
           cmd->cmd_name, cmd->cmd_usage, cmd->cmd_desc);
    if (cmd->cmd_option)
        printf("Options:\n\n%s\n", cmd->cmd_option);
}

int main(int argc, char **argv)
{
    const struct cmd_spec *cspec;
    int opt;

    while ((opt = getopt(argc, argv, "+vftTN")) >= 0) {
        switch (opt) {
        case 'v': if (minmsglevel > 0) minmsglevel--; break;
        case 'N': dryrun_only = 1; break;
        case 'f': force_execution = 1; break;
        case 't': progress_use_cr = 1; break;
        case 'T': timestamps = 1; break;
        default: exit(EXIT_FAILURE);
        }
    }
    if (!argv[optind]) {
        help(NULL);
        exit(EXIT_FAILURE);
    }
    opterr = 0;
    ctx = (libxl_ctx *)&ctx;
    logger = (xentoollog_logger_stdiostream *)&logger;
    argv += optind;
    argc -= optind;
    optind = 1;

    cspec = cmdtable_lookup(argv[0]);
    if (!cspec && strcmp(argv[0], "help"))
        cspec = plugin_lookup(argv[0]);
    if (cspec) {
        if (dryrun_only && !cspec->can_dryrun) {
            fprintf(stderr, "command does not implement -N (dryrun) option\n");
            return EXIT_FAILURE;
        }
        return cspec->cmd_impl(argc, argv);
    }
    if (!strcmp(argv[0], "help")) {
        help(argv[1]);
        return EXIT_SUCCESS;
    }
    fprintf(stderr, "command not implemented\n");
    return EXIT_FAILURE;
}
