//! What is killed.

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{bail, ensure, Context, Result};
use xl_vne::image::{
    DomainType, Downtime, Incoming, IncomingLimits, Member, MemberImage, MemberWriter, Name,
    SnapshotId, Store, WriterOptions,
};
use xl_vne::stream::Ingest;

use crate::guest;

/// Something that a process does to a store.
#[derive(Clone, Debug)]
pub enum Work {
    /// Take a snapshot; the seed is its label.
    Take { store: PathBuf, seed: u64 },
    /// Store a member of it, and print its image.
    Member {
        take: PathBuf,
        name: String,
        seed: u64,
    },
    /// Remove a snapshot.
    Remove { store: PathBuf, id: SnapshotId },
    /// Remove all but the newest ones, one after the other.
    Prune { store: PathBuf, keep: usize },
    /// Copy a snapshot out of another store.
    Copy {
        store: PathBuf,
        from: PathBuf,
        id: SnapshotId,
        seed: u64,
    },
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Work::Take { seed, .. } => write!(f, "take {seed}"),
            Work::Member { name, .. } => write!(f, "member {name}"),
            Work::Remove { id, .. } => write!(f, "remove {id}"),
            Work::Prune { keep, .. } => write!(f, "prune to {keep}"),
            Work::Copy { seed, .. } => write!(f, "copy {seed}"),
        }
    }
}

/// The VNE.
pub fn vne() -> Result<Name> {
    Ok(Name::new("lab")?)
}

/// A member's own number.
pub fn member_seed(seed: u64, name: &str) -> u64 {
    seed * 2 + u64::from(name == "web")
}

impl Work {
    /// What kind it is: takes, removals, prunings, copies.
    pub fn kind(&self) -> usize {
        match self {
            Work::Take { .. } | Work::Member { .. } => 0,
            Work::Remove { .. } => 1,
            Work::Prune { .. } => 2,
            Work::Copy { .. } => 3,
        }
    }

    /// As words of a command line.
    pub fn words(&self) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        match self {
            Work::Take { store, seed } => vec!["take".into(), text(store), seed.to_string()],
            Work::Member { take, name, seed } => {
                vec!["member".into(), text(take), name.clone(), seed.to_string()]
            }
            Work::Remove { store, id } => vec!["remove".into(), text(store), id.to_string()],
            Work::Prune { store, keep } => vec!["prune".into(), text(store), keep.to_string()],
            Work::Copy {
                store,
                from,
                id,
                seed,
            } => vec![
                "copy".into(),
                text(store),
                text(from),
                id.to_string(),
                seed.to_string(),
            ],
        }
    }

    /// Out of words of a command line.
    pub fn parse(words: &[String]) -> Result<Self> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Ok(match words[..] {
            ["take", store, seed] => Work::Take {
                store: store.into(),
                seed: seed.parse()?,
            },
            ["member", take, name, seed] => Work::Member {
                take: take.into(),
                name: name.into(),
                seed: seed.parse()?,
            },
            ["remove", store, id] => Work::Remove {
                store: store.into(),
                id: id.parse()?,
            },
            ["prune", store, keep] => Work::Prune {
                store: store.into(),
                keep: keep.parse()?,
            },
            ["copy", store, from, id, seed] => Work::Copy {
                store: store.into(),
                from: from.into(),
                id: id.parse()?,
                seed: seed.parse()?,
            },
            _ => bail!("no such work: {words:?}"),
        })
    }

    /// Does it in this process.
    pub fn run(&self) -> Result<()> {
        match self {
            Work::Take { store, seed } => take(store, *seed, None),
            Work::Member { take, name, seed } => {
                let image = member(take, name, *seed)?;
                // Who waits for it may have been killed.
                let line = serde_json::to_string(&image)?;
                let _ = writeln!(std::io::stdout(), "{line}");
                Ok(())
            }
            Work::Remove { store, id } => {
                let store = Store::open(store)?;
                Ok(store.catalogue().remove(&vne()?, id)?)
            }
            Work::Prune { store, keep } => prune(store, *keep),
            Work::Copy {
                store, from, id, ..
            } => copy(store, from, id),
        }
    }
}

/// As `xl vne-snapshot take` does: it begins by cleaning up. With an id, if that is
/// given.
pub fn take(root: &Path, seed: u64, id: Option<&SnapshotId>) -> Result<()> {
    let store = Store::open(root)?;
    store.clean_tmp()?;
    let mut take = match id {
        Some(id) => store.begin_as(&vne()?, id)?,
        None => store.begin(&vne()?)?,
    };
    let mut manifest = take.manifest(&Name::new("dom0")?);
    manifest.label = Some(seed.to_string());
    let mut workers = Vec::new();
    for name in ["db", "web"] {
        let work = Work::Member {
            take: take.dir().to_owned(),
            name: name.into(),
            seed: member_seed(seed, name),
        };
        let worker = Command::new(std::env::current_exe()?)
            .arg("--work")
            .args(work.words())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        workers.push((name, worker));
    }
    for (name, worker) in workers {
        let output = worker.wait_with_output()?;
        ensure!(output.status.success(), "member {name} failed");
        let image = serde_json::from_slice(&output.stdout)?;
        manifest.members.push(entry(name, image)?);
    }
    take.commit(&manifest)?;
    Ok(())
}

fn member(take: &Path, name: &str, seed: u64) -> Result<MemberImage> {
    let stream = guest::stream(seed)?;
    let name = Name::new(name)?;
    let mut writer = MemberWriter::create(take, &name, &WriterOptions::default())?;
    Ingest::new(&stream[..])
        .run(&mut writer)
        .context("the stream")?;
    Ok(writer.finish("{}")?)
}

fn prune(root: &Path, keep: usize) -> Result<()> {
    let store = Store::open(root)?;
    let catalogue = store.catalogue();
    let all = catalogue.list(Some(&vne()?))?.snapshots;
    let old = all.len().saturating_sub(keep);
    for manifest in all.iter().take(old) {
        catalogue.remove(&manifest.vne, &manifest.id)?;
    }
    catalogue.sweep()?;
    Ok(())
}

/// As two vneds do, the one that receives and the one that sends. A file is sent in
/// pieces, as there.
fn copy(root: &Path, from: &Path, id: &SnapshotId) -> Result<()> {
    const PIECE_BYTES: usize = 64;
    let from = Store::open(from)?.catalogue().get(&vne()?, id)?;
    let store = Store::open(root)?;
    let manifest = from.manifest_to_copy()?;
    let limits = IncomingLimits::default();
    let begun = Incoming::begin(&store, &Name::new("dom1")?, manifest, limits)?;
    let Some(mut incoming) = begun else {
        return Ok(());
    };
    for name in incoming.wanted() {
        incoming.begin_member(&name)?;
        for (file, bytes) in from.files_to_copy(&name)? {
            for (nth, piece) in bytes.chunks(PIECE_BYTES).enumerate() {
                incoming.file(&name, file, (nth * PIECE_BYTES) as u64, piece)?;
            }
        }
        let mut outgoing = from.member_to_copy(&name)?;
        while let Some(batch) = outgoing.next_batch() {
            let lacking = incoming.batch(&name, &batch.bytes)?;
            for mut frame in outgoing.read(&batch, &lacking)? {
                incoming.frame(&name, &frame.bytes, frame.count)?;
                outgoing.arrived(&frame.take_hashes());
            }
        }
        if let Some(frame) = outgoing.close_frame()? {
            incoming.frame(&name, &frame.bytes, frame.count)?;
        }
        incoming.end_member(&name)?;
    }
    incoming.finish()?;
    Ok(())
}

fn entry(name: &str, image: MemberImage) -> Result<Member> {
    Ok(Member {
        name: Name::new(name)?,
        domid: 1,
        uuid: String::from("c0ffee00-0000-4000-8000-000000000000"),
        host: Name::new("dom0")?,
        domain_type: DomainType::Pvh,
        memory_kib: 0,
        vcpus: 1,
        ran_on: None,
        downtime: Downtime::default(),
        rounds: 3,
        pages_sent: image.stats.pages_received,
        pages_final_dirty: 0,
        stream_bytes: 0,
        diverged: false,
        throttled_to: None,
        uncaptured_disks: Vec::new(),
        read_only_disks: Vec::new(),
        disks: Vec::new(),
        late_frames: 0,
        recorded: None,
        timeline: None,
        image,
    })
}
