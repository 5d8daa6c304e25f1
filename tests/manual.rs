//! The documents and the command agree: what the command understands is in its
//! manual, and what the manual and the other documents show is understood.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

type TestResult = Result<(), Box<dyn Error>>;

const MANUAL: &str = "packaging/man/xl-vne-snapshot.1.pod";
const VNED: &str = "packaging/man/vned.8.pod";
const VNE_CONF: &str = "packaging/man/vne.conf.5.pod";

fn path(of: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(of)
}

fn read(of: &str) -> Result<String, Box<dyn Error>> {
    std::fs::read_to_string(path(of)).map_err(|error| format!("{of}: {error}").into())
}

/// The options of each verb, as `-x` and `--xxx`, without help.
type Options = BTreeMap<String, BTreeSet<String>>;

fn understood() -> Options {
    let options_of = |verb: &clap::Command| {
        let mut options = BTreeSet::new();
        for argument in verb.get_arguments() {
            options.extend(argument.get_short().map(|short| format!("-{short}")));
            options.extend(argument.get_long().map(|long| format!("--{long}")));
        }
        options
    };
    let mut understood = Options::new();
    for verb in xl_vne::cli::command().get_subcommands() {
        let name = verb.get_name();
        // One that has verbs of its own is documented by them.
        if !verb.has_subcommands() {
            understood.insert(name.to_owned(), options_of(verb));
        }
        for nested in verb.get_subcommands() {
            let name = format!("{name} {}", nested.get_name());
            understood.insert(name, options_of(nested));
        }
    }
    understood
}

/// What the manual has an item for, below "VERBS".
fn documented(manual: &str) -> Options {
    let mut options = Options::new();
    let mut verb = String::new();
    let mut depth = 0;
    for line in section(manual, "VERBS").lines() {
        if line.starts_with("=over") {
            depth += 1;
        } else if line.starts_with("=back") {
            depth -= 1;
        } else if let Some(item) = line.strip_prefix("=item ") {
            let bold = bold(item);
            if depth == 1 {
                verb = bold.first().copied().unwrap_or_default().to_owned();
                options.entry(verb.clone()).or_default();
            } else {
                let found = bold.into_iter().filter(|word| word.starts_with('-'));
                let known = options.entry(verb.clone()).or_default();
                known.extend(found.map(str::to_owned));
            }
        }
    }
    options
}

/// From one `=head1` to the next.
fn section<'a>(manual: &'a str, title: &str) -> &'a str {
    let heading = format!("=head1 {title}\n");
    let start = manual
        .find(&heading)
        .map_or(manual.len(), |at| at + heading.len());
    let rest = &manual[start..];
    rest.find("\n=head1 ").map_or(rest, |end| &rest[..end])
}

/// What stands in `B<…>` on a line of POD.
fn bold(text: &str) -> Vec<&str> {
    let parts = text.split("B<").skip(1);
    parts
        .filter_map(|part| Some(part.split_once('>')?.0))
        .collect()
}

#[test]
fn the_manual_has_all_verbs_and_options_and_no_others() -> TestResult {
    assert_eq!(documented(&read(MANUAL)?), understood());
    Ok(())
}

#[test]
fn options_that_the_manual_mentions_exist() -> TestResult {
    let manual = read(MANUAL)?;
    let mut known: BTreeSet<String> = understood().into_values().flatten().collect();
    known.extend(["-h", "--help", "-V", "--version", "-v"].map(str::to_owned));
    for word in bold(&manual)
        .into_iter()
        .filter(|word| word.starts_with('-') && *word != "-")
    {
        assert!(known.contains(word), "{word}");
    }
    Ok(())
}

/// The keys that a source file asks libxlutil for are those that a page lists in
/// a section.
fn same_keys(source: &str, page: &str, title: &str) -> TestResult {
    let source = read(source)?;
    let code = source.split("#[cfg(test)]").next().unwrap_or_default();
    let keys: BTreeSet<&str> = code
        .split("(c\"")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once('"')?.0))
        .collect();
    let manual = read(page)?;
    let items: BTreeSet<&str> = section(&manual, title)
        .lines()
        .filter_map(|line| Some(line.strip_prefix("=item B<")?.split_once('=')?.0))
        .collect();
    assert!(!keys.is_empty());
    assert_eq!(items, keys);
    Ok(())
}

#[test]
fn the_manual_has_all_keys_of_a_vnes_description_and_no_others() -> TestResult {
    same_keys("plugin/cli/config.rs", MANUAL, "THE DESCRIPTION OF A VNE")
}

#[test]
fn the_manual_has_all_keys_of_a_hosts_description_and_no_others() -> TestResult {
    let source = "plugin/cli/hostconf.rs";
    same_keys(source, MANUAL, "THE DESCRIPTION OF A HOST")?;
    same_keys(source, VNE_CONF, "KEYS")
}

/// Lines of the documents that a reader would type.
#[test]
fn examples_in_the_documents_are_understood() -> TestResult {
    for document in [MANUAL, "README.md"] {
        let text = read(document)?;
        let examples: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|line| line.starts_with("xl vne-snapshot "))
            .collect();
        assert!(!examples.is_empty(), "{document} has no examples");
        for example in examples {
            let words = example.split_whitespace().skip(1);
            let parsed = xl_vne::cli::command().try_get_matches_from(words);
            assert!(parsed.is_ok(), "{document}: {example}: {:?}", parsed.err());
        }
    }
    Ok(())
}

#[test]
fn the_manual_is_sound_pod() -> TestResult {
    [MANUAL, VNED, VNE_CONF].into_iter().try_for_each(sound_pod)
}

fn sound_pod(page: &str) -> TestResult {
    let run = |program: &str| {
        Command::new(program)
            .args(["--", page])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .map_err(|error| format!("{program} (Debian: perl): {error}"))
    };
    let checked = run("podchecker")?;
    let told = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert!(
        checked.status.success() && told.contains("syntax OK"),
        "{told}"
    );
    assert!(!told.contains("WARNING"), "{told}");

    let page = run("pod2man")?;
    let told = String::from_utf8_lossy(&page.stderr);
    assert!(page.status.success() && told.is_empty(), "{told}");
    // pod2man puts what it couldn't read into a section of its own.
    assert!(!String::from_utf8_lossy(&page.stdout).contains("POD ERRORS"));
    Ok(())
}
