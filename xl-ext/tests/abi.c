/*
 * The ABI in numbers, for 64-bit machines.  If this doesn't compile, then
 * the change to xl_plugin.h breaks plugins that are out there: append
 * fields, and never touch those that are here.
 */

#include "xl_plugin.h"

#define AT(type, field, offset) \
    _Static_assert(offsetof(struct type, field) == offset, \
                   #type "." #field " has moved")

_Static_assert(XL_PLUGIN_ABI_VERSION >> 16 == 1, "major version");

AT(xl_plugin_host, struct_size, 0);
AT(xl_plugin_host, abi_version, 8);
AT(xl_plugin_host, minmsglevel, 12);
AT(xl_plugin_host, dryrun, 16);
AT(xl_plugin_host, force, 20);
AT(xl_plugin_host, timestamps, 24);
AT(xl_plugin_host, progress_use_cr, 28);
AT(xl_plugin_host, xl_version, 32);
AT(xl_plugin_host, xl_path, 40);
AT(xl_plugin_host, config_dir, 48);
AT(xl_plugin_host, script_dir, 56);
AT(xl_plugin_host, libexec_bin_dir, 64);
AT(xl_plugin_host, lib_dir, 72);
AT(xl_plugin_host, run_dir, 80);
AT(xl_plugin_host, log_dir, 88);
AT(xl_plugin_host, lock_dir, 96);
AT(xl_plugin_host, ctx, 104);
AT(xl_plugin_host, logger, 112);
AT(xl_plugin_host, error, 120);
AT(xl_plugin_host, error_size, 128);

AT(xl_plugin_command, name, 0);
AT(xl_plugin_command, main, 8);
AT(xl_plugin_command, can_dryrun, 16);
AT(xl_plugin_command, modifies, 20);
AT(xl_plugin_command, desc, 24);
AT(xl_plugin_command, usage, 32);
AT(xl_plugin_command, options, 40);

AT(xl_plugin, struct_size, 0);
AT(xl_plugin, name, 8);
AT(xl_plugin, version, 16);
AT(xl_plugin, ncommands, 24);
AT(xl_plugin, command_size, 32);
AT(xl_plugin, commands, 40);
