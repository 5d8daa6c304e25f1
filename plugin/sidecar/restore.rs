//! Brings a snapshot back on this host: all members are built paused, then
//! all are released together. What they send waits until all are connected, see
//! `held.rs`.
//!
//! Each member is built by stock `xl restore -p`, which reads a save file that
//! is generated from the image as it goes, and leaves behind the monitor that
//! an admin expects (`on_reboot` and the like work as ever).

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::copy;
use super::error::Error;
use super::fit::Needs;
use super::guard::{BUILDER_END_MAX, KILLED_END_MAX};
use super::held::{self, Held, Recorded};
use super::journal::{Joint, Journal, JournalDomain, Record, Register, RestoreStage};
use super::part::start_guard;
use super::rpc::CopyProgress;
use super::signals;
use super::take::sweep;
use super::workers::{journal_process, Program, Words};
use crate::disk::exchange::{self, Change, Exchange};
use crate::image::{self, Manifest, Member, MemoryShare, Name, Snapshot, Store};
use crate::net::{self, Frame};
use crate::sentence::sentence;
use crate::stream;

const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// How many members are built at a time, at least: there is always one to go on with.
const AT_ONCE_MIN: usize = 2;
/// How large the pipe to a builder is: each time that it's full and empty again costs two
/// switches from one process to another.
const PIPE_BYTES: usize = 1 << 20;
/// As much as goes into a pipe at once: between two such writes it's looked
/// whether to go on.
const WRITE_BYTES_MAX: usize = PIPE_BYTES / 4;

/// What to restore and how.
#[derive(Debug)]
pub struct RestoreRequest {
    /// The root of the image store, for the journal.
    pub store: PathBuf,
    /// Xen's folder for what is gone after a reboot.
    pub run_dir: PathBuf,
    /// How xl is started.
    pub program: Program,
    /// The host that leads the restore and what that is called, if there are
    /// several hosts.
    pub joint: Option<(Name, Joint)>,
    /// The members to restore; none for those that ran on this host.
    pub members: Option<Vec<Name>>,
    /// Not the members themselves, but copies: what the VNE that they make up is
    /// called.
    pub copy: Option<Name>,
    /// Leave the members paused when all are built. What was recorded of their
    /// frames is left out then: it would have to wait for as long as they do.
    pub paused: bool,
    /// Bytes that the members may take together, if there is a limit.
    pub memory_bytes: Option<u64>,
}

/// What there is to see of a restore while it works.
pub trait Progress {
    /// A part of the snapshot goes from one host to another.
    fn copying(&mut self, how_far: CopyProgress);
    /// All is checked; the members are being built.
    fn building(&mut self, members: &[&str]);
    /// One is built, paused.
    fn built(&mut self, member: &str);
    /// All run, and so many recorded frames were played back.
    fn released(&mut self, played: u64);
}

/// Restores all members of `snapshot`, or none. All are on this host.
pub fn restore(
    request: &RestoreRequest,
    snapshot: &Snapshot,
    progress: &mut dyn Progress,
) -> Result<(), Error> {
    let (said, heard) = mpsc::channel();
    let interrupt = said.clone();
    let enough = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&enough);
    signals::watch(move || {
        flag.store(true, Ordering::Relaxed);
        // Nobody listens once all is built.
        let _ = interrupt.send(Heard::Interrupted);
        true
    })?;
    let mut built = build(request, snapshot, (said, heard), progress)?;
    let recorded = built.recorded();
    if request.paused {
        if let Some(lost) = not_played_back(recorded) {
            log::warn!("{lost}");
        }
        return built.leave_paused();
    }
    if enough.load(Ordering::Relaxed) {
        built.discard();
        return Err(interrupted());
    }
    built.run()?;
    for late in built.wait_connected(|| enough.load(Ordering::Relaxed)) {
        log::warn!("{late}");
    }
    built.let_frames_go();
    progress.released(recorded);
    Ok(())
}

/// What to tell whoever has asked for paused members.
pub(super) fn not_played_back(recorded: u64) -> Option<String> {
    (recorded > 0).then(|| {
        format!(
            "{recorded} recorded frames aren't played back, since the members stay paused: they \
             have to be sent again"
        )
    })
}

/// The members that are to be built here.
fn chosen<'m>(
    request: &RestoreRequest,
    manifest: &'m Manifest,
) -> impl Iterator<Item = &'m Member> {
    let chosen = request.members.clone();
    let of_host = manifest.host.clone();
    manifest.members_here().filter(move |member| match &chosen {
        Some(chosen) => chosen.contains(&member.name),
        None => member.host == of_host,
    })
}

/// What is recorded of the frames that a member had sent, in order.
fn recorded(snapshot: &Snapshot, member: &Name) -> Result<Vec<Frame>, Error> {
    let Some(file) = snapshot.recorded_frames(member)? else {
        return Ok(Vec::new());
    };
    Ok(net::frames::decode(&file)?)
}

/// Members of a snapshot that are built and paused.
pub(super) struct Built {
    program: Program,
    journal: Journal,
    names: Vec<String>,
    /// What they send; none if they have no interfaces, or are to stay paused.
    held: Option<Held>,
    /// How many frames are recorded of them.
    recorded: u64,
    /// Their disks, of which it isn't decided yet whether they stay.
    exchange: Option<Exchange>,
}

/// Builds all members of `snapshot` that are on this host, or none.
pub(super) fn build(
    request: &RestoreRequest,
    snapshot: &Snapshot,
    (said, heard): (Sender<Heard>, Receiver<Heard>),
    progress: &mut dyn Progress,
) -> Result<Built, Error> {
    let register = Register::open(&request.run_dir)?;
    sweep(&request.program, &register)?;
    let store = Store::open(&request.store)?;
    recover_disks(&store, &register)?;
    let manifest = snapshot.manifest();
    let number = crate::random::number();
    let number = number.map_err(Error::start("get a random number"))?;
    let mut changes = Vec::new();
    let memory = match request.memory_bytes {
        Some(limit) => Some(MemoryShare::of(limit, chosen(request, manifest).count())?),
        None => None,
    };
    // Every header and index is read and checked before the first domain is
    // built; each page is checked as it's read.
    let mut domains = Vec::new();
    let mut members = Vec::new();
    let mut frames = Vec::new();
    for entry in chosen(request, manifest) {
        let mut reader = snapshot.member(&entry.name)?;
        if let Some(memory) = memory {
            reader.limit(memory);
        }
        let first = changes.len();
        for piece in snapshot.disks(&entry.name)? {
            let change = match &request.copy {
                None => Change::put_back(piece, number, changes.len()),
                Some(copy) => Change::make(piece, copy.as_str()),
            };
            let unfit = |error| {
                let (name, vdev, why) = (&entry.name, &piece.vdev, sentence(&error));
                Error::Failed(format!("{vdev} of '{name}': {why}; nothing was touched"))
            };
            changes.push(change.map_err(unfit)?);
        }
        let (name, uuid, config) = match &request.copy {
            None => (entry.name.clone(), entry.uuid.clone(), None),
            Some(copy) => {
                let disks = changes.iter().skip(first).filter_map(Change::made);
                let disks: Vec<_> = disks.collect();
                let member = copy::member(copy, &entry.name, reader.config_json(), &disks)?;
                (member.name, member.uuid, Some(member.config_json))
            }
        };
        let source = move |pipe: Pipe| {
            let pipe = BufWriter::with_capacity(1 << 20, pipe);
            reader.write_save_file(pipe, config.as_deref())
        };
        members.push((name.to_string(), source));
        frames.push(Recorded {
            member: name.to_string(),
            frames: recorded(snapshot, &entry.name)?,
        });
        domains.push(JournalDomain {
            name: name.to_string(),
            domid: 0,
            uuid,
        });
    }
    let recorded = frames;
    let names: Vec<String> = domains.iter().map(|domain| domain.name.clone()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let needs = Needs::of(manifest, chosen(request, manifest), request.copy.as_ref())?;
    let problems = needs.problems_here(&request.program)?;
    if !problems.is_empty() {
        let problems = problems.join("; ");
        return Err(Error::Failed(format!("{problems}; nothing was touched")));
    }

    let folder = exchange::folder(&store.tmp(), number);
    let folder = Some(folder).filter(|_| !changes.is_empty());
    let vne = request.copy.as_ref().unwrap_or(&manifest.vne);
    let record = Record {
        vne: vne.to_string(),
        leader: request.joint.as_ref().map(|(leader, _)| leader.to_string()),
        pid: std::process::id(),
        store: request.store.clone(),
        domains,
        asked: false,
        workers: Vec::new(),
        holds: Vec::new(),
        caps: Vec::new(),
        restore: Some(RestoreStage::Building),
        joint: request.joint.as_ref().map(|(_, joint)| joint.clone()),
        exchange: folder.clone(),
    };

    let mut journal = register.enter(record)?;
    start_guard(&request.program, &journal)?;

    progress.building(&names);
    let mut exchange = None;
    let mut built = Ok(());
    if let Some(folder) = folder {
        let begun = Exchange::begin(&folder, changes);
        let carried_out = begun.and_then(|begun| exchange.insert(begun).carry_out());
        built = carried_out.map_err(|error| Error::Failed(sentence(&error)));
    }
    let mut builders = Builders::new(&request.program, BUILDER_END_MAX);
    if built.is_ok() {
        built = builders.build(&mut journal, members, (said, heard), progress);
    }
    let mut held = None;
    if built.is_ok() && !request.paused {
        built = hold(&request.program, &mut journal, &recorded).map(|holds| held = holds);
    }
    if built.is_ok() && request.joint.is_some() {
        // From here on others may be told to let theirs run.
        let noted = journal.update(|record| record.restore = Some(RestoreStage::Built));
        built = noted.map_err(Error::from);
    }
    let built_all = Built {
        program: request.program.clone(),
        journal,
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        held,
        recorded: count(&recorded),
        exchange,
    };
    match built {
        Ok(()) => Ok(built_all),
        Err(error) => {
            // What can't be undone here is left to the guard, with the journal.
            if builders.have_ended() {
                built_all.discard();
            }
            Err(error)
        }
    }
}

fn count(recorded: &[Recorded]) -> u64 {
    recorded.iter().map(|one| one.frames.len() as u64).sum()
}

/// Holds what the members send. Where that isn't possible and nothing is
/// recorded, they go without: what they send too early is lost then, as on any
/// network.
fn hold(
    program: &Program,
    journal: &mut Journal,
    recorded: &[Recorded],
) -> Result<Option<Held>, Error> {
    match Held::build(program, journal, recorded) {
        Err(error) if count(recorded) == 0 => {
            log::warn!(
                "{}; frames that members send before all are connected may be lost",
                sentence(&error)
            );
            held::discard(journal.record())?;
            journal.update(|record| record.holds.clear())?;
            Ok(None)
        }
        other => other,
    }
}

impl Built {
    /// Goes on with what a daemon before this one has built. Its holds, and what
    /// was played back into them, ended with it.
    pub(super) fn resume(program: &Program, mut journal: Journal) -> Result<Self, Error> {
        start_guard(program, &journal)?;
        held::discard(journal.record())?;
        journal.update(|record| record.holds.clear())?;
        let folder = journal.record().exchange.as_deref();
        let exchange = folder.map_or(Ok(None), Exchange::open);
        let exchange = exchange.map_err(|error| Error::Failed(sentence(&error)))?;
        let domains = journal.record().domains.iter();
        Ok(Self {
            program: program.clone(),
            names: domains.map(|domain| domain.name.clone()).collect(),
            journal,
            held: None,
            recorded: 0,
            exchange,
        })
    }

    /// How many frames are recorded of the members. They wait to be let go,
    /// unless the members are to stay paused.
    pub(super) fn recorded(&self) -> u64 {
        self.recorded
    }

    /// Whether what the members send waits to be let go.
    pub(super) fn holds_frames(&self) -> bool {
        self.held.is_some()
    }

    /// Sets all running. What they send waits.
    pub(super) fn run(&mut self) -> Result<(), Error> {
        if self.names.is_empty() {
            return Ok(());
        }
        if let Some(exchange) = &mut self.exchange {
            // Before the first guest writes to its disk.
            let kept = exchange.keep();
            kept.map_err(|error| Error::Failed(sentence(&error)))?;
        }
        let releasing = RestoreStage::Releasing;
        self.journal
            .update(|record| record.restore = Some(releasing))?;
        let mut release = self.program.command(&["release", "--"]);
        release.args(&self.names).stderr(Stdio::inherit());
        let status = release.status();
        let status = status.map_err(Error::start("release the members"))?;
        if !status.success() {
            return Err(Error::Failed(String::from(
                "not all members could be set running",
            )));
        }
        Ok(())
    }

    /// Waits until all can receive again, not for ever, and not if `enough` says
    /// so. What to tell an admin of those that can't.
    pub(super) fn wait_connected(&mut self, enough: impl FnMut() -> bool) -> Vec<String> {
        let Some(held) = &mut self.held else {
            return Vec::new();
        };
        let start = Instant::now();
        let late = held.wait_connected(enough);
        log::debug!("waited {:?} for front ends", start.elapsed());
        let waited = start.elapsed().as_secs_f64();
        let told = late
            .iter()
            .map(|late| format!("{late} isn't connected after {waited:.0} s: frames may be lost"));
        told.collect()
    }

    /// Lets go of what the members have sent, and ends the restore. What can't
    /// be taken down is left to the guard, with the journal.
    pub(super) fn let_frames_go(self) {
        let released = self.held.map_or(Ok(()), Held::release);
        keep_disks(self.exchange);
        let closed = released.map_err(Error::from);
        let closed = closed.and_then(|()| Ok(self.journal.close()?));
        if let Err(error) = closed {
            log::error!("{}", sentence(&error));
        }
    }

    /// Leaves them paused, as their owner wants to have them.
    pub(super) fn leave_paused(mut self) -> Result<(), Error> {
        // The redirects first.
        self.held = None;
        held::discard(self.journal.record())?;
        keep_disks(self.exchange);
        Ok(self.journal.close()?)
    }

    /// Destroys them. What can't be is left to the guard, with the journal.
    pub(super) fn discard(mut self) {
        // The redirects first.
        self.held = None;
        let gone = held::discard(self.journal.record());
        // Whoever goes on with it from here on has nothing to ask.
        let building = RestoreStage::Building;
        if let Err(error) = self
            .journal
            .update(|record| record.restore = Some(building))
        {
            log::error!("{}", sentence(&error));
        }
        let destroyed = discard(&self.program, &self.journal.record().domains);
        if !destroyed {
            return;
        }
        // They are nobody's now.
        let back = self.exchange.map_or(Ok(()), Exchange::back);
        if let Err(error) = &back {
            log::error!("{}", sentence(error));
        }
        if back.is_ok() && gone.is_ok() {
            if let Err(error) = self.journal.close() {
                log::error!("{}", sentence(&error));
            }
        }
    }
}

/// The members have their disks, and what these were before isn't needed any more. What
/// can't be removed of it, the next restore tries again.
fn keep_disks(exchange: Option<Exchange>) {
    if let Some(Err(error)) = exchange.map(Exchange::forward) {
        log::warn!("what disks were before stays: {}", sentence(&error));
    }
}

/// Ends what restores have left undecided whose host was restarted.
pub(super) fn recover_disks(store: &Store, register: &Register) -> Result<(), Error> {
    let failed = |error| Error::Failed(sentence(&error));
    let folders = exchange::folders(&store.tmp()).map_err(failed)?;
    if folders.is_empty() {
        return Ok(());
    }
    let known = register.records()?;
    for folder in folders {
        let mut known = known.iter();
        if !known.any(|record| record.exchange.as_ref() == Some(&folder)) {
            exchange::recover(&folder).map_err(failed)?;
        }
    }
    Ok(())
}

/// Destroys what was built, whole or half, in a process that has libxl.
fn discard(program: &Program, domains: &[JournalDomain]) -> bool {
    let mut command = program.command(&["discard", "--"]);
    for domain in domains {
        command.arg(format!("{}={}", domain.name, domain.uuid));
    }
    let status = command.stderr(Stdio::inherit()).status();
    status.is_ok_and(|status| status.success())
}

/// What is heard while members are built.
#[derive(Debug)]
pub(super) enum Heard {
    /// A builder has been given all of its save file, or as much as it took.
    Fed(usize, Result<(), String>),
    /// A signal asks to stop.
    Interrupted,
}

/// The processes that build the members, some at a time: with more than there are
/// processors none is built sooner, and their hotplug scripts, which libxl gives 40 s,
/// come to run all at once. With xl.conf's 'autoballoon' stock xl has a lock that lets
/// one of them build.
struct Builders<'a> {
    program: &'a Program,
    /// How many are fed or build at a time.
    at_once: usize,
    /// How long they may take to end when they're called off.
    patience: Duration,
    all: Vec<Builder>,
    called_off: Arc<AtomicBool>,
}

impl<'a> Builders<'a> {
    fn new(program: &'a Program, patience: Duration) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            program,
            at_once: processors.max(AT_ONCE_MIN),
            patience,
            all: Vec::new(),
            called_off: Arc::default(),
        }
    }

    /// Builds all `members`, each from what writes its save file. When one
    /// fails, or at an interrupt, all are called off.
    fn build<S>(
        &mut self,
        journal: &mut Journal,
        members: Vec<(String, S)>,
        (said, heard): (Sender<Heard>, Receiver<Heard>),
        progress: &mut dyn Progress,
    ) -> Result<(), Error>
    where
        S: FnOnce(Pipe) -> Result<(), image::Error> + Send + 'static,
    {
        let (names, sources): (Vec<_>, Vec<_>) = members.into_iter().unzip();
        let mut sources = sources.into_iter();
        let mut result = self.start(journal, &names);
        let mut ends_until = None;
        while self.all.iter().any(|builder| !builder.told) {
            if result.is_ok() {
                self.feed_next(&mut sources, &said);
            }
            match heard.recv_timeout(LOOK_INTERVAL) {
                Ok(Heard::Fed(index, fed)) => {
                    if let Some(builder) = self.all.get_mut(index) {
                        builder.fed = Some(fed);
                    }
                }
                Ok(Heard::Interrupted) => keep_first(&mut result, interrupted()),
                // It can't be that nobody is left to speak: we are.
                Err(_) => {}
            }
            for builder in &mut self.all {
                match builder.look() {
                    None => {}
                    Some(Ok(())) => progress.built(&builder.name),
                    Some(Err(why)) => keep_first(&mut result, Error::Failed(why)),
                }
            }
            if result.is_ok() {
                continue;
            }
            self.call_off();
            let until = *ends_until.get_or_insert_with(|| Instant::now() + self.patience);
            if Instant::now() > until {
                self.kill();
                if self.have_ended() || Instant::now() > until + KILLED_END_MAX {
                    break;
                }
            }
        }
        if heard
            .try_iter()
            .any(|what| matches!(what, Heard::Interrupted))
        {
            keep_first(&mut result, interrupted());
        }
        result
    }

    /// All are in the journal before the first one gets anything to build from:
    /// until then they end by themselves if this process is killed.
    fn start(&mut self, journal: &mut Journal, names: &[String]) -> Result<(), Error> {
        for name in names {
            let builder = Builder::start(self.program, name).map_err(Error::start("start xl"))?;
            self.all.push(builder);
        }
        let processes = self.all.iter().map(|b| journal_process(&b.child)).collect();
        Ok(journal.update(|record| record.workers = processes)?)
    }

    /// Begins to feed those that come next, if not enough are at work. `sources` are
    /// those of builders that haven't been fed, in their order.
    fn feed_next<S>(&mut self, sources: &mut std::vec::IntoIter<S>, said: &Sender<Heard>)
    where
        S: FnOnce(Pipe) -> Result<(), image::Error> + Send + 'static,
    {
        let first = self.all.len().saturating_sub(sources.len());
        let fed = self.all.iter().take(first);
        let at_work = fed.filter(|builder| !builder.told).count();
        let next = self.all.iter_mut().enumerate().skip(first);
        for (index, builder) in next.take(self.at_once.saturating_sub(at_work)) {
            let (Some(source), Some(pipe)) = (sources.next(), builder.child.stdin.take()) else {
                continue;
            };
            builder.fed = None;
            let (said, called_off) = (said.clone(), Arc::clone(&self.called_off));
            std::thread::spawn(move || {
                let fed = feed(source, Pipe { pipe, called_off });
                // A receiver that is gone means that nobody wants to know.
                let _ = said.send(Heard::Fed(index, fed));
            });
        }
    }

    /// Ends their save files. Stock xl then destroys what it has half built.
    fn call_off(&mut self) {
        self.called_off.store(true, Ordering::Relaxed);
        for builder in &mut self.all {
            builder.child.stdin = None;
        }
    }

    fn kill(&mut self) {
        for builder in self.all.iter_mut().filter(|b| b.status.is_none()) {
            if let Err(error) = builder.child.kill() {
                log::warn!("xl restore of '{}': {error}", builder.name);
            }
        }
    }

    fn have_ended(&self) -> bool {
        self.all.iter().all(|builder| builder.status.is_some())
    }
}

/// An 'xl restore' that builds one member.
struct Builder {
    name: String,
    child: Child,
    words: Words,
    /// How feeding it ended; `None` while it's being fed.
    fed: Option<Result<(), String>>,
    status: Option<ExitStatus>,
    /// What became of it was told.
    told: bool,
}

impl Builder {
    fn start(program: &Program, name: &str) -> io::Result<Self> {
        let words = Words::new()?;
        let child = program
            .xl_command("restore")
            .args(["-p", "/dev/stdin"])
            .stdin(Stdio::piped())
            .stderr(words.stdio(program)?)
            .spawn()?;
        if let Some(pipe) = &child.stdin {
            if let Err(error) = rustix::pipe::fcntl_setpipe_size(pipe, PIPE_BYTES) {
                log::debug!("the pipe to xl restore of '{name}' stays small: {error}");
            }
        }
        Ok(Self {
            name: name.to_owned(),
            child,
            words,
            fed: Some(Ok(())),
            status: None,
            told: false,
        })
    }

    /// Tells once how it ended.
    fn look(&mut self) -> Option<Result<(), String>> {
        if self.told {
            return None;
        }
        if self.status.is_none() {
            match self.child.try_wait() {
                Ok(status) => self.status = status,
                Err(error) => {
                    self.told = true;
                    return Some(Err(format!("xl restore of '{}': {error}", self.name)));
                }
            }
        }
        let status = self.status?;
        let fed = self.fed.clone()?;
        self.told = true;
        // An image that can't be read; a pipe that xl closed is xl's story.
        if let Err(why) = fed {
            return Some(Err(format!("{}: {why}", self.name)));
        }
        if status.success() {
            return Some(Ok(()));
        }
        Some(Err(format!(
            "xl restore of '{}': {status}\n  {}",
            self.name,
            self.words.last().join("\n  ")
        )))
    }
}

/// The way to a builder's stdin.
#[derive(Debug)]
struct Pipe {
    pipe: ChildStdin,
    called_off: Arc<AtomicBool>,
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.called_off.load(Ordering::Relaxed) {
            return Err(io::Error::other("called off"));
        }
        let length = bytes.len().min(WRITE_BYTES_MAX);
        self.pipe.write(bytes.get(..length).unwrap_or(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.pipe.flush()
    }
}

fn feed<S>(source: S, pipe: Pipe) -> Result<(), String>
where
    S: FnOnce(Pipe) -> Result<(), image::Error>,
{
    match source(pipe) {
        Err(image::Error::Stream {
            source: stream::Error::Write { source },
            ..
        }) if source.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| sentence(&error)),
    }
}

fn interrupted() -> Error {
    Error::Failed(String::from("interrupted"))
}

fn keep_first(kept: &mut Result<(), Error>, error: Error) {
    if kept.is_ok() {
        *kept = Err(error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::Command;

    type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

    /// What a program in place of xl builds, with two members, two at a time, and a
    /// journal.
    struct Lab {
        members: Vec<String>,
        dir: tempfile::TempDir,
        program: Program,
        journal: Journal,
        built: Vec<String>,
    }

    impl Progress for Vec<String> {
        fn copying(&mut self, _how_far: CopyProgress) {}
        fn building(&mut self, _members: &[&str]) {}
        fn built(&mut self, member: &str) {
            self.push(member.to_owned());
        }
        fn released(&mut self, _played: u64) {}
    }

    impl Lab {
        /// `script` has the folder in `$dir`.
        fn new(script: &str) -> TestResult<Self> {
            let dir = tempfile::tempdir()?;
            let xl = dir.path().join("xl");
            let text = format!("#!/bin/sh\ndir={}\n{script}\n", dir.path().display());
            // By another process: while one of ours is forked, a file that was
            // open for writing can't be run.
            let made = Command::new("sh")
                .args(["-c", "printf %s \"$1\" > \"$0\"; chmod 700 \"$0\""])
                .arg(&xl)
                .arg(text)
                .status()?;
            assert!(made.success());
            let record = Record::of_restore(RestoreStage::Building);
            Ok(Self {
                members: ["a", "b"].map(String::from).into(),
                journal: Register::open(dir.path())?.enter(record)?,
                program: Program { xl, verbosity: 0 },
                dir,
                built: Vec::new(),
            })
        }

        /// Builds members of so many MiB; `before` comes before the first byte.
        fn build(
            &mut self,
            patience: Duration,
            mib: u64,
            before: impl Fn() + Clone + Send + 'static,
            interrupt: impl FnOnce(Sender<Heard>),
        ) -> TestResult<String> {
            let member = |name: &String| {
                let before = before.clone();
                let source = move |mut pipe: Pipe| {
                    before();
                    // A failure shows at the other end.
                    let _ = (0..mib).try_for_each(|_| pipe.write_all(&vec![7; 1 << 20]));
                    Ok(())
                };
                (name.clone(), source)
            };
            let members = self.members.iter().map(member).collect();
            let (said, heard) = mpsc::channel();
            interrupt(said.clone());
            let mut builders = Builders::new(&self.program, patience);
            builders.at_once = 2;
            let result = builders.build(&mut self.journal, members, (said, heard), &mut self.built);
            assert!(builders.have_ended());
            Ok(result
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default())
        }

        fn path(&self) -> &Path {
            self.dir.path()
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_builder_that_complains_at_length_is_not_blocked() -> TestResult {
        let mut lab = Lab::new("head -c 300000 /dev/zero >&2; cat >/dev/null")?;
        assert_eq!(lab.build(LONG, 1, || {}, drop)?, "");
        lab.built.sort();
        assert_eq!(lab.built, ["a", "b"]);
        Ok(())
    }

    #[test]
    fn builders_are_in_the_journal_before_they_are_fed() -> TestResult {
        let mut lab = Lab::new("echo $$ >>$dir/pids; cat >/dev/null")?;
        let (folder, seen) = (lab.journal.folder().to_owned(), lab.path().join("seen"));
        let copy = seen.clone();
        let before = move || {
            let _ = std::fs::copy(folder.join("journal.json"), &copy);
        };
        assert_eq!(lab.build(LONG, 1, before, drop)?, "");
        let record: Record = serde_json::from_slice(&std::fs::read(&seen)?)?;
        let mut known: Vec<_> = record.workers.iter().map(|w| w.pid.to_string()).collect();
        let pids = std::fs::read_to_string(lab.path().join("pids"))?;
        let mut pids: Vec<_> = pids.lines().collect();
        known.sort();
        pids.sort_unstable();
        assert_eq!(known, pids);
        assert!(record.workers.iter().all(|worker| worker.start_ticks > 0));
        Ok(())
    }

    #[test]
    fn of_many_members_two_are_fed_at_a_time() -> TestResult {
        let script = "head -c 1 >/dev/null; echo begins >>$dir/log; cat >/dev/null; \
                      sleep 0.05; echo ends >>$dir/log";
        let mut lab = Lab::new(script)?;
        lab.members = (0..7).map(|member| format!("m{member}")).collect();
        assert_eq!(lab.build(LONG, 1, || {}, drop)?, "");
        let log = std::fs::read_to_string(lab.path().join("log"))?;
        let mut at_work = 0;
        let mut most = 0;
        for line in log.lines() {
            at_work += if line == "begins" { 1 } else { -1 };
            most = most.max(at_work);
        }
        assert_eq!((log.lines().count(), at_work, most), (14, 0, 2));
        assert_eq!(lab.built.len(), 7);
        Ok(())
    }

    #[test]
    fn one_that_fails_keeps_the_others_from_being_fed() -> TestResult {
        let mut lab = Lab::new("head -c 1 >>$dir/fed; test ! -s $dir/fed")?;
        lab.members = (0..7).map(|member| format!("m{member}")).collect();
        assert!(lab.build(LONG, 1, || {}, drop)?.contains("status: 1"));
        assert!(std::fs::read(lab.path().join("fed"))?.len() <= 2);
        Ok(())
    }

    #[test]
    fn an_interrupt_ends_the_save_files_and_waits_for_the_builders() -> TestResult {
        // They stop reading, as when another one has xl's lock.
        let script =
            "head -c 1000 >/dev/null; sleep 0.3; cat >/dev/null; echo gone >>$dir/gone; exit 1";
        let mut lab = Lab::new(script)?;
        let interrupt = |said: Sender<Heard>| {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                let _ = said.send(Heard::Interrupted);
            });
        };
        assert_eq!(lab.build(LONG, u64::MAX, || {}, interrupt)?, "interrupted");
        let gone = std::fs::read_to_string(lab.path().join("gone"))?;
        assert_eq!(gone.lines().count(), 2);
        assert!(lab.built.is_empty());
        Ok(())
    }

    #[test]
    fn one_that_fails_calls_the_others_off_and_is_quoted() -> TestResult {
        let script = "if mkdir $dir/first 2>/dev/null; then echo no memory >&2; exit 3; fi\n\
                      exec sleep 60";
        let mut lab = Lab::new(script)?;
        let told = lab.build(Duration::from_millis(200), 1, || {}, drop)?;
        assert!(
            told.contains("no memory") && told.contains("status: 3"),
            "{told}"
        );
        Ok(())
    }
}
