//! `xl vne-snapshot peer`.

use std::path::Path;

use clap::Subcommand;
use serde::Serialize;

use super::hostconf::{self, Editor};
use super::units::{ms, table};
use super::{print, print_json, Failure, Host};
use crate::image::Name;
use crate::sidecar::admin::Daemon;
use crate::sidecar::conf::DEFAULT_PORT;
use crate::sidecar::conf::{host_name, is_any_address, listen_address, peer_address, Conf, Peer};
use crate::sidecar::tls::{self, Fingerprint, Identity};

/// Say which other hosts this one talks to, and who it is itself.
#[derive(Debug, clap::Args)]
#[command(disable_help_subcommand = true)]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Give this host an identity, once
    Init(Init),
    /// Show this host's name, address and fingerprint
    Id {
        /// Print as JSON
        #[arg(long)]
        json: bool,
    },
    /// Trust another host, or change what is known of it
    Add(Add),
    /// Trust another host no more
    Remove(Remove),
    /// List the hosts that this one trusts
    List {
        /// Print as JSON
        #[arg(long)]
        json: bool,
    },
    /// Try to reach a host that this one trusts, or all of them
    Test {
        /// Its name
        name: Option<Name>,
        /// Print as JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Init {
    /// This host's name among its peers [default: the node's, up to the first dot]
    #[arg(long, value_parser = host_name)]
    name: Option<Name>,
    /// Where to take peers' connections [default: 0.0.0.0:7791]
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = listen_address)]
    listen: Option<String>,
    /// Say what would be done, and do nothing (as 'xl -N')
    #[arg(short = 'N', long)]
    dry_run: bool,
}

#[derive(Debug, clap::Args)]
struct Add {
    /// Its name; what was known of a host with this name is replaced
    #[arg(value_parser = host_name)]
    name: Name,
    /// Where its daemon is reached: ADDRESS, or ADDRESS:PORT
    #[arg(value_parser = peer_address)]
    address: String,
    /// Its fingerprint, as 'peer id' prints there
    fingerprint: Fingerprint,
    /// A VNE that it may have members of; can be given again
    #[arg(long = "vne", value_name = "VNE", required = true)]
    vnes: Vec<Name>,
    /// Say what would be done, and do nothing (as 'xl -N')
    #[arg(short = 'N', long)]
    dry_run: bool,
}

#[derive(Debug, clap::Args)]
struct Remove {
    /// Its name
    #[arg(value_parser = host_name)]
    name: Name,
    /// Say what would be done, and do nothing (as 'xl -N')
    #[arg(short = 'N', long)]
    dry_run: bool,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let dir = &host.config_dir;
    match &arguments.verb {
        Verb::Init(arguments) => {
            let dry_run = arguments.dry_run || host.dry_run;
            print(&init(dir, arguments, dry_run)?)?;
            tell_daemon(host, dry_run)
        }
        Verb::Id { json } => {
            let card = Card::of(dir)?;
            if *json {
                print_json(&card)
            } else {
                print(&card.describe())
            }
        }
        Verb::Add(arguments) => {
            let dry_run = arguments.dry_run || host.dry_run;
            print(&add(dir, arguments, dry_run)?)?;
            tell_daemon(host, dry_run)
        }
        Verb::Remove(arguments) => {
            let dry_run = arguments.dry_run || host.dry_run;
            print(&remove(dir, &arguments.name, dry_run)?)?;
            tell_daemon(host, dry_run)
        }
        Verb::Test { name, json } => test(host, name.as_ref(), *json),
        Verb::List { json } => {
            let conf = hostconf::load(dir)?;
            if *json {
                print_json(&conf.peers)
            } else {
                print(&describe(&conf.peers))
            }
        }
    }
}

/// A daemon that runs follows at once.
fn tell_daemon(host: &Host, dry_run: bool) -> Result<(), Failure> {
    match Daemon::find(&host.run_dir)? {
        Some(daemon) if !dry_run => Ok(daemon.reload()?),
        _ => Ok(()),
    }
}

fn test(host: &Host, name: Option<&Name>, json: bool) -> Result<(), Failure> {
    let conf = hostconf::load(&host.config_dir)?;
    if let Some(name) = name.filter(|name| conf.peer(name).is_none()) {
        return Err(format!("there is no peer '{name}' (see 'xl vne-snapshot peer list')").into());
    }
    let daemon = Daemon::connect(&host.run_dir, "peers are reached by vned")?;
    let tests = daemon.test_peers(name)?;
    if json {
        print_json(&tests)?;
    } else {
        let mut rows = vec![["PEER", "ADDRESS", "ROUND TRIP", "RESULT"]
            .map(String::from)
            .to_vec()];
        rows.extend(tests.iter().map(|test| {
            let (trip, result) = match (&test.version, &test.error) {
                (Some(version), None) => (ms(test.round_trip_ns), format!("ok, vned {version}")),
                (_, why) => (String::from("-"), why.clone().unwrap_or_default()),
            };
            vec![test.name.to_string(), test.address.clone(), trip, result]
        }));
        print(&table(&rows))?;
    }
    match tests.iter().filter(|test| test.error.is_some()).count() {
        0 => Ok(()),
        bad => Err(format!("{bad} of {} peers can't be worked with", tests.len()).into()),
    }
}

/// What other hosts' admins want to know.
#[derive(Debug, Serialize)]
pub(super) struct Card {
    pub(super) name: Name,
    pub(super) listen: Option<String>,
    pub(super) fingerprint: Fingerprint,
}

impl Card {
    fn of(dir: &Path) -> Result<Self, Failure> {
        let conf = hostconf::load(dir)?;
        let identity = Identity::load(dir)?
            .ok_or("this host has no identity yet; 'xl vne-snapshot peer init' makes one")?;
        Ok(Self {
            name: conf.name,
            listen: conf.listen,
            fingerprint: identity.fingerprint(),
        })
    }

    fn describe(&self) -> String {
        let listen = self.listen.as_deref().unwrap_or("nowhere");
        let fingerprint = self.fingerprint.to_string();
        table(&[
            ["Name", self.name.as_str()].map(String::from).to_vec(),
            ["Listens at", listen].map(String::from).to_vec(),
            ["Fingerprint", &fingerprint].map(String::from).to_vec(),
        ])
    }

    /// What makes this host known on another one.
    fn introduction(&self) -> String {
        let Card {
            name, fingerprint, ..
        } = self;
        let listen = self.listen.as_deref().unwrap_or_default();
        let (address, hint) = if is_any_address(listen) {
            let port = listen.rsplit(':').next().unwrap_or_default();
            let hint = ", with the address at which it reaches this one";
            (format!("ADDRESS:{port}"), hint)
        } else {
            (listen.to_owned(), "")
        };
        format!(
            "On each host that is to know this one{hint}:\n    \
             xl vne-snapshot peer add {name} {address} {fingerprint} --vne VNE\n"
        )
    }
}

/// The configuration comes first: if that is as far as it gets, it can be done
/// again.
fn init(dir: &Path, arguments: &Init, dry_run: bool) -> Result<String, Failure> {
    let mut editor = Editor::open(dir)?;
    if Identity::load(dir)?.is_some() {
        let path = dir.join(tls::KEY_FILE);
        return Err(tls::Error::Exists { path }.into());
    }
    let mut said = editor.said().clone();
    let path = editor.path().to_owned();
    agree(&path, "name", &arguments.name, &mut said.name)?;
    agree(&path, "listen", &arguments.listen, &mut said.listen)?;
    let conf = Conf {
        listen: said
            .listen
            .clone()
            .or_else(|| Some(format!("0.0.0.0:{DEFAULT_PORT}"))),
        ..said.complete(&path)?
    };
    editor.introduce(&conf.name, conf.listen.as_deref().unwrap_or_default())?;
    editor.finish(&conf, dry_run)?;
    if dry_run {
        let (key, certificate) = (tls::KEY_FILE, tls::CERTIFICATE_FILE);
        return Ok(format!(
            "Would make {key} and {certificate} in {} for host {}.\n",
            dir.display(),
            conf.name
        ));
    }
    let card = Card {
        fingerprint: Identity::create(dir, &conf.name)?.fingerprint(),
        name: conf.name,
        listen: conf.listen,
    };
    Ok(card.describe() + &card.introduction())
}

/// What the file says already isn't changed by the way.
fn agree<T: Clone + PartialEq + std::fmt::Display>(
    path: &Path,
    key: &str,
    wanted: &Option<T>,
    said: &mut Option<T>,
) -> Result<(), Failure> {
    match (wanted, &*said) {
        (Some(wanted), Some(said)) if wanted != said => {
            let path = path.display();
            Err(
                format!("{path} has '{key}' as {said}; change it there, or leave out --{key}")
                    .into(),
            )
        }
        (Some(wanted), None) => {
            *said = Some(wanted.clone());
            Ok(())
        }
        _ => Ok(()),
    }
}

fn add(dir: &Path, arguments: &Add, dry_run: bool) -> Result<String, Failure> {
    let mut editor = Editor::open(dir)?;
    let mut conf = editor.said().clone().complete(editor.path())?;
    let own = Identity::load(dir)?.map(|identity| identity.fingerprint());
    if own == Some(arguments.fingerprint) {
        return Err("that is this host's own fingerprint; 'xl vne-snapshot peer id' on the other host prints the other's".into());
    }
    let mut peer = Peer {
        name: arguments.name.clone(),
        address: arguments.address.clone(),
        fingerprint: arguments.fingerprint,
        vnes: Vec::new(),
    };
    for vne in &arguments.vnes {
        if !peer.may(vne) {
            peer.vnes.push(vne.clone());
        }
    }
    let name = &arguments.name;
    let known = conf.peers.iter_mut().find(|known| known.name == *name);
    let old = match known {
        Some(known) => Some(std::mem::replace(known, peer)),
        None => {
            conf.peers.push(peer);
            None
        }
    };
    editor.set_peers(&conf.peers)?;
    editor.finish(&conf, dry_run)?;
    Ok(match (old, dry_run) {
        (None, true) => format!("Would add peer {name}.\n"),
        (None, false) => format!("Added peer {name}.\n"),
        (Some(old), true) => format!("Would replace peer {name}, which is\n    {old}\n"),
        (Some(old), false) => format!("Replaced peer {name}, which was\n    {old}\n"),
    })
}

fn remove(dir: &Path, name: &Name, dry_run: bool) -> Result<String, Failure> {
    let mut editor = Editor::open(dir)?;
    let mut conf = editor.said().clone().complete(editor.path())?;
    if conf.peer(name).is_none() {
        let path = editor.path().display();
        return Err(format!(
            "there is no peer '{name}' in {path}; 'xl vne-snapshot peer list' shows them"
        )
        .into());
    }
    conf.peers.retain(|peer| peer.name != *name);
    editor.set_peers(&conf.peers)?;
    editor.finish(&conf, dry_run)?;
    Ok(if dry_run {
        format!("Would remove peer {name}.\n")
    } else {
        String::new()
    })
}

fn describe(peers: &[Peer]) -> String {
    let mut rows = vec![["PEER", "ADDRESS", "FINGERPRINT", "VNES"]
        .map(String::from)
        .to_vec()];
    rows.extend(peers.iter().map(|peer| {
        let vnes: Vec<_> = peer.vnes.iter().map(Name::as_str).collect();
        vec![
            peer.name.to_string(),
            peer.address.clone(),
            peer.fingerprint.to_string(),
            vnes.join(" "),
        ]
    }));
    table(&rows)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::fs;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    /// Runs what would be typed after 'peer'.
    fn typed(dir: &tempfile::TempDir, line: &str) -> Result<String, String> {
        let words = ["peer"].into_iter().chain(line.split_whitespace());
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        let dir = dir.path();
        let result = match line.arguments.verb {
            Verb::Init(arguments) => init(dir, &arguments, arguments.dry_run),
            Verb::Id { .. } => Card::of(dir).map(|card| card.describe()),
            Verb::Add(arguments) => add(dir, &arguments, arguments.dry_run),
            Verb::Remove(arguments) => remove(dir, &arguments.name, arguments.dry_run),
            Verb::List { .. } => hostconf::load(dir).map(|conf| describe(&conf.peers)),
            Verb::Test { .. } => return Err("there is no daemon here".into()),
        };
        result.map_err(|error| crate::sentence::sentence(error.as_ref()))
    }

    fn files(dir: &tempfile::TempDir) -> Vec<(String, Vec<u8>)> {
        let entries = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap());
        let mut files: Vec<_> = entries
            .map(|entry| {
                let name = entry.file_name().into_string().unwrap();
                (name, fs::read(entry.path()).unwrap())
            })
            .collect();
        files.sort();
        files
    }

    const FINGERPRINT: &str = "3f2a-90c1-0000-ffff-1234-5678-9abc-def0";

    #[test]
    fn what_init_prints_makes_a_host_known_to_another() {
        let (alpha, beta) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for listen in ["10.0.0.1:1", "[::1]"] {
            let alpha = tempfile::tempdir().unwrap();
            let told = typed(&alpha, &format!("init --name alpha --listen {listen}")).unwrap();
            let line = told.lines().last().unwrap().trim();
            let line = line.strip_prefix("xl vne-snapshot peer ").unwrap();
            typed(&beta, line).unwrap();
            let known = hostconf::load(beta.path()).unwrap().peers.remove(0);
            let own = Card::of(alpha.path()).unwrap();
            assert_eq!((known.name, Some(known.address)), (own.name, own.listen));
            assert_eq!(known.fingerprint, own.fingerprint);
        }
        let told = typed(&alpha, "init").unwrap();
        assert!(told.contains(" ADDRESS:7791 "), "{told}");
        assert_eq!(
            hostconf::load(alpha.path()).unwrap().listen.as_deref(),
            Some("0.0.0.0:7791")
        );
        let again = typed(&alpha, "init").unwrap_err();
        assert!(again.contains("vne.key already"), "{again}");
    }

    #[test]
    fn init_does_not_change_what_the_file_says() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(hostconf::FILE);
        let text = "name = 'alpha' # mine\n";
        fs::write(&file, text).unwrap();
        let refused = typed(&dir, "init --name beta").unwrap_err();
        assert!(refused.contains("'name' as alpha"), "{refused}");
        assert_eq!(files(&dir).len(), 1);
        typed(&dir, "init --name alpha --listen 10.0.0.1").unwrap();
        let expected = format!("{text}listen = \"10.0.0.1:7791\"\n");
        assert_eq!(fs::read_to_string(&file).unwrap(), expected);
        assert!(typed(&dir, "id").unwrap().contains("alpha"));
    }

    #[test]
    fn a_host_without_an_identity_is_told_how_to_get_one() {
        let dir = tempfile::tempdir().unwrap();
        assert!(typed(&dir, "id").unwrap_err().contains("peer init"));
    }

    #[test]
    fn a_peer_of_the_same_name_is_replaced_and_that_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let told = typed(
            &dir,
            &format!("add beta 10.0.0.2 {FINGERPRINT} --vne lab --vne lab"),
        );
        assert_eq!(told.unwrap(), "Added peer beta.\n");
        let other = FINGERPRINT.replace('0', "1");
        let told = typed(
            &dir,
            &format!("add beta [::1]:5 {other} --vne web --vne db"),
        )
        .unwrap();
        assert!(
            told.contains("Replaced peer beta") && told.contains(FINGERPRINT),
            "{told}"
        );
        let list = typed(&dir, "list").unwrap();
        let row = format!("beta  [::1]:5  {other}  web db");
        assert_eq!(list.lines().nth(1), Some(row.as_str()), "{list}");
        typed(&dir, "remove beta").unwrap();
        assert_eq!(typed(&dir, "list").unwrap().lines().count(), 1);
        assert!(typed(&dir, "remove beta")
            .unwrap_err()
            .contains("peer list"));
    }

    #[test]
    fn a_dry_run_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let would = |line: &str| {
            let before = files(&dir);
            assert!(typed(&dir, line).unwrap().starts_with("Would "), "{line}");
            assert_eq!(files(&dir), before, "{line}");
        };
        would("init -N --name alpha");
        let add = format!("add beta 10.0.0.2 {FINGERPRINT} --vne lab");
        would(&format!("{add} --dry-run"));
        typed(&dir, &add).unwrap();
        would(&format!("{add} -N"));
        would("remove beta -N");
    }

    #[test]
    fn this_host_is_not_its_own_peer() {
        let dir = tempfile::tempdir().unwrap();
        typed(&dir, "init --name alpha").unwrap();
        let own = Card::of(dir.path()).unwrap().fingerprint;
        let before = files(&dir);
        for (line, expected) in [
            (
                format!("add beta 10.0.0.2 {own} --vne lab"),
                "own fingerprint",
            ),
            (
                format!("add alpha 10.0.0.2 {FINGERPRINT} --vne lab -N"),
                "this host itself",
            ),
            (format!("add b 10.0.0.2 {FINGERPRINT}"), "--vne"),
            (
                format!("add b ::1 {FINGERPRINT} --vne lab"),
                "[2001:db8::2]",
            ),
            ("add b 10.0.0.2 3f2a --vne lab".into(), "8 groups"),
        ] {
            let error = typed(&dir, &line).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        assert_eq!(files(&dir), before);
    }
}
