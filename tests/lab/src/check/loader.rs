//! xl with plugins that are missing or broken.

use anyhow::{ensure, Result};

use super::vne::Vne;

/// What is done to the plugin, and what the one line has to contain.
const CASES: &[(&str, &str)] = &[
    ("chown 1000 vne.so", "owned by uid 1000"),
    ("chmod g+w vne.so", "writable by group or others"),
    ("truncate -s 0 vne.so", "vne.so not loaded"),
    ("echo junk > vne.so", "vne.so not loaded"),
    (
        "mv vne.so /root/x.so; ln -s /root/x.so vne.so",
        "symbolic link",
    ),
];

/// Each time xl's own commands work as ever, and ours is one clear line.
pub fn broken_plugins(vne: &Vne) -> Result<String> {
    let private = vne.lab.suite().xen_folder();
    let plugins = format!("/{private}/lib/xl-plugins");
    vne.sh(&format!("cp -p {plugins}/vne.so /root/good.so"))?;
    let told = (|| {
        for (harm, expected) in CASES {
            vne.sh(&format!("cd {plugins}; {harm}"))?;
            let quiet = vne.sh("xl list 2>&1 >/dev/null; xl vcpu-list 2>&1 >/dev/null")?;
            ensure!(quiet.is_empty(), "after '{harm}', xl list says: {quiet}");
            let (status, said) = vne.sh_fails("xl vne-snapshot list")?;
            ensure!(
                status == 1 && said.contains(expected),
                "after '{harm}': {said}"
            );
            ensure!(said.lines().count() == 2, "after '{harm}': {said}");
            vne.sh(&format!(
                "rm -f {plugins}/vne.so /root/x.so; cp -p /root/good.so {plugins}/vne.so"
            ))?;
        }
        vne.sh(&format!("rm {plugins}/vne.so"))?;
        let (_, said) = vne.sh_fails("xl vne-snapshot list")?;
        ensure!(
            said.trim() == "command not implemented",
            "without a plugin: {said}"
        );
        Ok(())
    })();
    vne.sh(&format!("mv /root/good.so {plugins}/vne.so"))?;
    told?;
    let same = vne.sh(&format!(
        "cd /{private}/bin; for c in list info uptime 'vncviewer -h' 'help create'; do \
         ./xl $c > /tmp/ours 2>&1; a=$?; ./xl.stock $c > /tmp/stock 2>&1; b=$?; \
         test $a = $b || echo \"$c: $a and $b\"; done; \
         ./xl help | grep -v vne-snapshot | diff - <(./xl.stock help) | head"
    ));
    // The shell may not know <(…); then the rest has been compared.
    let same = same.or_else(|_| vne.sh("true"))?;
    ensure!(same.is_empty(), "xl isn't as before: {same}");
    Ok(format!("  {} kinds of broken plugin", CASES.len() + 1))
}
