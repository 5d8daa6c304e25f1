//! The crates that programs are linked with: their notices have to go along.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::lab::process;

/// Longest licence file that is taken in, in bytes: none comes near.
const NOTICE_BYTES_MAX: u64 = 256 << 10;

/// Writes one text with all crates, their licences and notices.
pub fn licences(root: &Path, to: &Path) -> Result<()> {
    let metadata = process::capture(
        Command::new(env!("CARGO"))
            .args(["metadata", "--format-version", "1", "--locked"])
            .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
            .current_dir(root),
    )?;
    let metadata: Value =
        serde_json::from_str(&metadata).context("cannot read what cargo says of the crates")?;
    let mut head = String::from(
        "Crates that xl-vne is linked with, and the licence of each as its author states it.\n\
         Where there is a choice with MIT, MIT is chosen. The texts follow.\n\n",
    );
    let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for id in linked(&metadata).context("cargo says nothing of the package's dependencies")? {
        let Some(package) = package(&metadata, &id) else {
            continue;
        };
        let text = |key: &str| package.get(key).and_then(Value::as_str).unwrap_or_default();
        // Our own have no source.
        if package.get("source").is_none_or(Value::is_null) {
            continue;
        }
        let name = format!("{} {}", text("name"), text("version"));
        head.push_str(&format!("  {name}: {}\n", text("license")));
        let folder = Path::new(text("manifest_path"))
            .parent()
            .unwrap_or(Path::new(""));
        for notice in notices(folder)? {
            texts.entry(notice).or_default().insert(name.clone());
        }
    }
    for (text, names) in texts {
        let names: Vec<String> = names.into_iter().collect();
        head.push_str(&format!(
            "\n{}\n{}:\n\n{text}\n",
            "=".repeat(72),
            names.join(", ")
        ));
    }
    fs::write(to, head).with_context(|| format!("cannot write {}", to.display()))
}

/// The packages that end up in the product: normal dependencies, and theirs.
fn linked(metadata: &Value) -> Option<BTreeSet<String>> {
    let nodes = metadata.pointer("/resolve/nodes")?.as_array()?;
    let by_id: BTreeMap<&str, &Value> = nodes
        .iter()
        .filter_map(|node| Some((node.get("id")?.as_str()?, node)))
        .collect();
    let packages = metadata.get("packages")?.as_array()?;
    let own = packages
        .iter()
        .find(|package| package.get("name").and_then(Value::as_str) == Some("xl-vne"))?;
    let mut todo = vec![own.get("id")?.as_str()?];
    let mut found = BTreeSet::new();
    while let Some(id) = todo.pop() {
        if !found.insert(id.to_owned()) {
            continue;
        }
        let wanted = by_id.get(id).and_then(|node| node.get("deps")?.as_array());
        for dependency in wanted.into_iter().flatten() {
            let kinds = dependency.get("dep_kinds").and_then(Value::as_array);
            let normal = |kind: &Value| kind.get("kind").is_none_or(Value::is_null);
            if kinds.is_some_and(|kinds| kinds.iter().any(normal)) {
                todo.extend(dependency.get("pkg").and_then(Value::as_str));
            }
        }
    }
    Some(found)
}

fn package<'a>(metadata: &'a Value, id: &str) -> Option<&'a Value> {
    let packages = metadata.get("packages")?.as_array()?;
    packages
        .iter()
        .find(|package| package.get("id").and_then(Value::as_str) == Some(id))
}

/// The texts of a crate's licences, but for the Apache licence where MIT is
/// there to choose.
fn notices(folder: &Path) -> Result<Vec<String>> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .to_uppercase();
            path.is_file()
                && ["LICEN", "COPY", "NOTICE"]
                    .iter()
                    .any(|start| name.starts_with(start))
        })
        .collect();
    let is = |path: &Path, word: &str| path.to_string_lossy().to_uppercase().ends_with(word);
    if files.iter().any(|path| is(path, "MIT")) {
        files.retain(|path| !is(path, "APACHE") && !is(path, "APACHE-2.0"));
    }
    files.sort();
    files
        .iter()
        .filter(|path| {
            path.metadata()
                .is_ok_and(|data| data.len() <= NOTICE_BYTES_MAX)
        })
        .map(|path| {
            let bytes =
                fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
        })
        .collect()
}
