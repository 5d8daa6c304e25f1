//! The product, built and laid out as a package would install it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{bail, Context, Result};
use serde_json::Value;

use crate::builder::Builder;
use crate::lab::{self, Lab};
use crate::suite::Suite;

/// What building needs: package, and the program or file that proves it.
const TOOLS: &[(&str, &str)] = &[
    ("build-essential", "gcc"),
    ("pkg-config", "pkg-config"),
    ("libxen-dev", "/usr/include/libxl.h"),
    ("libyajl-dev", "/usr/include/yajl/yajl_version.h"),
    ("libclang-dev", "/usr/share/doc/libclang-dev"),
    ("clang", "clang"),
];

/// Installs what building needs.
pub fn install_tools() -> Result<()> {
    lab::install(TOOLS)
}

/// Builds everything for a suite and returns the folder that holds the installed
/// layout.
pub fn stage(suite: Suite) -> Result<PathBuf> {
    let builder = Builder::of(suite)?;
    let built = build_plugin(&builder)?;
    let root = lab::workspace();
    let stage = builder.folder().join("stage");
    if stage.exists() {
        fs::remove_dir_all(&stage).context("cannot empty the stage")?;
    }
    let private = stage.join(suite.xen_folder());
    let programs = private.join("bin");
    fs::create_dir_all(&programs).context("cannot create the stage")?;
    build_xl(&builder, suite, &programs)?;
    copy(&built.shims.join("vne-save-helper"), &programs)?;
    copy(&built.shims.join("vne-save-policy.so"), &programs)?;
    copy(&builder.folder().join("release/vned"), &programs)?;
    copy(&root.join("packaging/systemd/vned.service"), &programs)?;
    copy(&root.join("packaging/hotplug/vif-vne"), &programs)?;
    let plugins = private.join("lib/xl-plugins");
    fs::create_dir_all(&plugins).context("cannot create the plugins' folder")?;
    fs::copy(&built.plugin, plugins.join("vne.so")).context("cannot copy the plugin")?;
    Ok(stage)
}

/// Builds, for a suite, one of the programs that only checks use, an example of the
/// product's package.
pub fn example(suite: Suite, name: &str) -> Result<PathBuf> {
    let builder = Builder::of(suite)?;
    let script =
        format!("\"$CARGO\" build --release --locked --quiet --package xl-vne --example {name}");
    let status = builder
        .command(&[], &[], &script)?
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("the program {name} doesn't build ({status})");
    }
    Ok(builder.folder().join("release/examples").join(name))
}

/// Where cargo builds.
pub fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}

/// Installs the stage on a host of the lab; the distribution's xl is kept
/// beside ours as `xl.stock`. The lab's dom0 has no journal: the daemon's log is
/// a file.
pub fn install(lab: &Lab, host: usize, stage: &Path) -> Result<()> {
    let folder = lab.suite().xen_folder();
    lab.put(host, &stage.join(&folder), "/root/stage")?;
    let script = format!(
        "set -e; cd /{folder}; test -e bin/xl.stock || cp -p bin/xl bin/xl.stock; \
         chown -R root:root /root/stage; chmod -R go-w /root/stage; \
         for f in bin/xl bin/vne-save-helper bin/vne-save-policy.so lib/xl-plugins/vne.so; do \
         mkdir -p ${{f%/*}}; cp /root/stage/$f $f.new; chmod 755 $f.new; mv $f.new $f; done; \
         install -m 755 /root/stage/bin/vned /usr/sbin/vned.new; mv /usr/sbin/vned.new /usr/sbin/vned; \
         install -m 644 /root/stage/bin/vned.service /etc/systemd/system; \
         install -m 755 /root/stage/bin/vif-vne /etc/xen/scripts; \
         mkdir -p /etc/systemd/system/vned.service.d; \
         printf '[Service]\\nStandardError=append:/var/log/vned.log\\n' \
         > /etc/systemd/system/vned.service.d/lab.conf; systemctl daemon-reload; \
         rm -rf /root/stage"
    );
    lab.run(host, &script).map(drop)
}

/// What cargo has built.
struct Built {
    plugin: PathBuf,
    /// The folder of what c-shim was compiled into.
    shims: PathBuf,
}

fn build_plugin(builder: &Builder) -> Result<Built> {
    let script = "\"$CARGO\" build --release --locked --package xl-vne \
                  --message-format json-render-diagnostics";
    let output = builder
        .command(&[], &[], script)?
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the product doesn't build ({})", output.status);
    }
    let mut plugin = None;
    let mut shims = None;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let text = |path: &str| message.pointer(path).and_then(Value::as_str);
        let ours = text("/package_id").is_some_and(|id| id.contains("xl-vne"));
        match text("/reason") {
            Some("build-script-executed") if ours => shims = text("/out_dir").map(PathBuf::from),
            Some("compiler-artifact") if text("/target/name") == Some("xl_vne") => {
                let files = message.pointer("/filenames").and_then(Value::as_array);
                let names = files.into_iter().flatten().filter_map(Value::as_str);
                plugin = names
                    .map(PathBuf::from)
                    .find(|name| name.extension().is_some_and(|is| is == "so"))
                    .or(plugin);
            }
            _ => {}
        }
    }
    match (plugin, shims) {
        (Some(plugin), Some(shims)) => Ok(Built { plugin, shims }),
        _ => bail!("cargo didn't say where it built the plugin"),
    }
}

fn build_xl(builder: &Builder, suite: Suite, programs: &Path) -> Result<()> {
    let source = lab::xen_source(suite)?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let (source_text, programs) = (text(&source), text(programs));
    let variables = [("SRC", source_text.as_str()), ("OUT", programs.as_str())];
    let output = builder
        .command(&[&source], &variables, "xl-ext/build \"$SRC\" \"$OUT\"")?
        .output()
        .context("cannot run xl-ext/build")?;
    if !output.status.success() {
        bail!(
            "xl-ext/build failed ({}):\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

fn copy(file: &Path, folder: &Path) -> Result<()> {
    let name = file.file_name().context("a file without a name")?;
    fs::copy(file, folder.join(name))
        .map(drop)
        .with_context(|| format!("cannot copy {}", file.display()))
}
