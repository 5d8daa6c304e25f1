//! The documents and the command agree: what the command understands is in its
//! manual, and what the manual and the other documents show is understood.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

type TestResult = Result<(), Box<dyn Error>>;

const MANUAL: &str = "packaging/man/xl-vne-snapshot.1.pod";
const VNED: &str = "packaging/man/vned.8.pod";
const PLUGINS: &str = "xl-ext/patches/4.17/0003-docs-describe-xl-s-plugins.patch";
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

/// Options as a program's own help lists them.
fn helped(help: &str) -> BTreeSet<String> {
    let words = help
        .lines()
        .map(str::trim_start)
        // A hyphen alone is before each value that an option may have.
        .filter(|line| line.starts_with('-') && !line.starts_with("- "))
        .flat_map(|line| {
            line.split("  ")
                .next()
                .unwrap_or_default()
                .split([',', ' '])
        });
    words
        .filter(|word| word.starts_with('-'))
        .map(|word| {
            word.split(['=', '[', '.'])
                .next()
                .unwrap_or_default()
                .to_owned()
        })
        .collect()
}

#[test]
fn the_daemons_manual_has_all_options_of_its_help_and_no_others() -> TestResult {
    let help = Command::new(env!("CARGO_BIN_EXE_vned"))
        .arg("--help")
        .output()?;
    let manual = read(VNED)?;
    let items = section(&manual, "OPTIONS")
        .lines()
        .filter_map(|line| line.strip_prefix("=item "));
    let documented: BTreeSet<String> = items.flat_map(bold).map(str::to_owned).collect();
    assert!(documented.len() > 4);
    assert_eq!(helped(&String::from_utf8_lossy(&help.stdout)), documented);
    Ok(())
}

/// The same for each verb as a user asks for it, not as clap knows it.
#[test]
fn help_of_each_verb_lists_the_options_of_the_manual() -> TestResult {
    let documented = documented(&read(MANUAL)?);
    for (verb, mut options) in documented {
        let words = ["xl vne-snapshot"].into_iter().chain(verb.split(' '));
        let asked = xl_vne::cli::command().try_get_matches_from(words.chain(["--help"]));
        let help = asked.err().ok_or("help is no error?")?.to_string();
        options.extend(["-h", "--help"].map(str::to_owned));
        assert_eq!(helped(&help), options, "{verb}");
    }
    Ok(())
}

/// What each page says of exit statuses is what comes out.
#[test]
fn the_manuals_have_all_exit_statuses() -> TestResult {
    for page in [MANUAL, VNED] {
        let manual = read(page)?;
        let statuses: Vec<&str> = section(&manual, "EXIT STATUS")
            .lines()
            .filter_map(|line| line.strip_prefix("=item B<")?.strip_suffix('>'))
            .collect();
        assert_eq!(statuses, ["0", "1", "2"], "{page}");
    }
    let vned = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vned"));
        command
            .args(arguments)
            .output()
            .map(|output| output.status.code())
    };
    assert_eq!(vned(&["--version"])?, Some(0));
    assert_eq!(vned(&["--check-config", "--xl", "/bin/false"])?, Some(1));
    assert_eq!(vned(&["--nonsense"])?, Some(2));
    Ok(())
}

#[test]
fn the_manual_is_sound_pod() -> TestResult {
    [MANUAL, VNED, VNE_CONF].into_iter().try_for_each(sound_pod)
}

/// That page is a part of the patches to xl.
#[test]
fn the_page_about_plugins_is_sound_pod() -> TestResult {
    let patch = read(PLUGINS)?;
    let added = patch
        .lines()
        .skip_while(|line| *line != "+++ b/docs/man/xl-plugins.7.pod")
        .skip(2)
        .take_while(|line| line.starts_with('+'));
    let page: String = added.map(|line| format!("{}\n", &line[1..])).collect();
    assert!(page.starts_with("=head1 NAME") && page.len() > 4_000);
    let file = tempfile::Builder::new().suffix(".pod").tempfile()?;
    std::fs::write(file.path(), page)?;
    sound_pod(&file.path().to_string_lossy())
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
