//! Copies of snapshots to other hosts: this host's side that sends.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::prelude::{Engine, BASE64_STANDARD};
use jsonrpsee::core::client::{Client, Error as RpcError};
use tokio::task::JoinSet;

use super::super::error::Error;
use super::super::rpc::{
    explain, CopyDone, CopyProgress, CopyState, JobDone, JobId, JobTold, PeerClient, SnapshotRef,
};
use super::jobs::Job;
use super::Daemon;
use crate::image::{Name, OutgoingMember, SentFrame, Snapshot, Store};
use crate::sentence::sentence;
use crate::stream::PAGE_SIZE;

/// Frames that are on their way at a time: 2 MiB, which is what a link of 1 Gb/s
/// takes in at a round trip of 16 ms.
const ON_THE_WAY_MAX: usize = 8;
/// Bytes of a file in one call.
const FILE_BYTES_MAX: usize = 1 << 20;
/// Between two words about how far it is.
const TOLD_INTERVAL: Duration = Duration::from_millis(200);

impl Daemon {
    /// Starts to copy a snapshot of the store at `root` to another host.
    pub(super) fn start_copy(
        self: &Arc<Self>,
        snapshot: SnapshotRef,
        root: PathBuf,
        host: Name,
    ) -> Result<JobId, Error> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&interrupted);
        let daemon = Arc::clone(self);
        let interrupt = move || flag.store(true, Ordering::Relaxed);
        let work = move |job: &Arc<Job>| {
            crate::priority::background();
            let copied = daemon.copy(&snapshot, &root, &host, &interrupted, job);
            match copied {
                Ok(done) => JobDone::Copied(done),
                Err(error) => JobDone::Failed(sentence(&error)),
            }
        };
        let started = self.jobs.start(interrupt, work);
        started.map_err(Error::start("start a thread"))
    }

    /// Whether a peer may have this host's part of a snapshot sent somewhere: what's in
    /// members' memory is nobody's who isn't trusted with that.
    pub(super) fn check_gives(&self, peer: &Name, snapshot: &SnapshotRef) -> Result<(), Error> {
        if self.accepts(peer) {
            return Ok(());
        }
        let here = self.here();
        Err(Error::Failed(format!(
            "host '{here}' sends its part of {snapshot} elsewhere for nobody but its own root: \
             there, xl vne-snapshot copy {snapshot} HOST; or say accept_members = [ \"{peer}\" ] \
             in its vne.conf, which trusts that host as root"
        )))
    }

    /// Copies what the store at `root` has of a snapshot to another host.
    pub(super) fn copy(
        self: &Arc<Self>,
        snapshot: &SnapshotRef,
        root: &Path,
        host: &Name,
        interrupted: &AtomicBool,
        job: &Arc<Job>,
    ) -> Result<CopyDone, Error> {
        let remote = self.peer_for(host, &snapshot.vne)?;
        let catalogue = Store::open(root)?.catalogue();
        let opened = catalogue.get(&snapshot.vne, &snapshot.id)?;
        opened.check_copyable()?;
        let begun = Instant::now();
        // A connection of its own: takes don't wait behind it.
        let client = self.runtime.block_on(remote.connect_apart());
        let client = client.map_err(|why| Error::Failed(format!("host '{host}': {why}")))?;
        let mut sending = Sending {
            daemon: self,
            host,
            client: Arc::new(client),
            interrupted,
            job,
            told: Instant::now(),
            progress: CopyProgress::default(),
        };
        let received = sending.send(snapshot, &opened);
        let received = received.map_err(|error| match error {
            // What was sent may have arrived.
            Error::Failed(why) => Error::Failed(format!(
                "{why} (what has arrived there is kept for a day: copy again to go on)"
            )),
            other => other,
        })?;
        Ok(CopyDone {
            members: received,
            pages: sending.progress.done_bytes / PAGE_SIZE as u64,
            pages_sent: sending.progress.sent_pages,
            sent_bytes: sending.progress.sent_bytes,
            duration_ns: u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
        })
    }
}

/// A copy that is under way.
struct Sending<'a> {
    daemon: &'a Arc<Daemon>,
    host: &'a Name,
    client: Arc<Client>,
    interrupted: &'a AtomicBool,
    job: &'a Arc<Job>,
    told: Instant,
    progress: CopyProgress,
}

type Frames = JoinSet<Result<Vec<[u8; 32]>, RpcError>>;

impl Sending<'_> {
    /// The members that were sent.
    fn send(&mut self, snapshot: &SnapshotRef, opened: &Snapshot) -> Result<Vec<Name>, Error> {
        let manifest = serde_json::to_value(opened.manifest_to_copy()?)
            .map_err(|error| Error::Failed(error.to_string()))?;
        let of = snapshot.clone();
        self.call(|client| async move { client.copy_begin(of, manifest).await })?;
        let state = self.wait()?;
        if let Some(done) = state.done {
            return Ok(done.members);
        }
        let wanted = state.wanted.unwrap_or_default();
        let mut members = Vec::new();
        for member in opened.manifest().members_here() {
            let name = &member.name;
            if wanted.contains(name) {
                let member = opened.member_to_copy(name)?;
                self.progress.total_bytes += member.pages() * PAGE_SIZE as u64;
                members.push((name, member));
            }
        }
        for (name, member) in members {
            self.member(opened, name, member)?;
        }
        // Also if none was wanted: an earlier copy may have come so far, and no further.
        self.call(|client| async move { client.copy_end().await })?;
        let done = self.wait()?.done;
        Ok(done.map(|done| done.members).unwrap_or_default())
    }

    fn member(
        &mut self,
        opened: &Snapshot,
        name: &Name,
        mut member: OutgoingMember,
    ) -> Result<(), Error> {
        let of = name.clone();
        self.call(|client| async move { client.copy_member(of).await })?;
        self.wait()?;
        for (file, bytes) in opened.files_to_copy(name)? {
            for (nth, part) in bytes.chunks(FILE_BYTES_MAX).enumerate() {
                let (of, file) = (name.clone(), file.to_owned());
                let offset = (nth * FILE_BYTES_MAX) as u64;
                let data = BASE64_STANDARD.encode(part);
                self.call(|client| async move { client.copy_file(of, file, offset, data).await })?;
                self.progress.sent_bytes += part.len() as u64;
            }
        }
        let mut frames = Frames::new();
        while let Some(batch) = member.next_batch() {
            let (of, pages) = (name.clone(), BASE64_STANDARD.encode(&batch.bytes));
            let lacking = self.call(|client| async move { client.copy_pages(of, pages).await })?;
            let lacking = BASE64_STANDARD
                .decode(lacking)
                .map_err(|error| self.failed(&error.to_string()))?;
            for frame in member.read(&batch, &lacking)? {
                self.frame(name, &mut member, &mut frames, frame)?;
            }
            self.progress.done_bytes += (batch.pages() * PAGE_SIZE) as u64;
            self.tell(false);
        }
        if let Some(frame) = member.close_frame()? {
            self.frame(name, &mut member, &mut frames, frame)?;
        }
        while !frames.is_empty() {
            self.reap(&mut member, &mut frames)?;
        }
        self.tell(true);
        let of = name.clone();
        self.call(|client| async move { client.copy_member_end(of).await })?;
        self.wait()?;
        Ok(())
    }

    /// Sends a frame, and waits only if too many are on their way.
    fn frame(
        &mut self,
        name: &Name,
        member: &mut OutgoingMember,
        frames: &mut Frames,
        mut frame: SentFrame,
    ) -> Result<(), Error> {
        while frames.len() >= ON_THE_WAY_MAX {
            self.reap(member, frames)?;
        }
        self.check_interrupted()?;
        let hashes = frame.take_hashes();
        let (count, data) = (frame.count, BASE64_STANDARD.encode(&frame.bytes));
        self.progress.sent_pages += u64::from(count);
        self.progress.sent_bytes += frame.bytes.len() as u64;
        let (client, of) = (Arc::clone(&self.client), name.clone());
        let call = async move {
            client.copy_frame(of, count, data).await?;
            Ok(hashes)
        };
        frames.spawn_on(call, &self.daemon.runtime);
        Ok(())
    }

    fn reap(&self, member: &mut OutgoingMember, frames: &mut Frames) -> Result<(), Error> {
        match self.daemon.runtime.block_on(frames.join_next()) {
            Some(Ok(Ok(hashes))) => member.arrived(&hashes),
            Some(Ok(Err(error))) => return Err(self.failed(&explain(&error))),
            Some(Err(error)) => return Err(self.failed(&error.to_string())),
            None => {}
        }
        Ok(())
    }

    fn check_interrupted(&self) -> Result<(), Error> {
        match self.interrupted.load(Ordering::Relaxed) {
            true => Err(Error::Failed(String::from("interrupted"))),
            false => Ok(()),
        }
    }

    fn failed(&self, why: &str) -> Error {
        Error::Failed(format!("host '{}': {why}", self.host))
    }

    fn call<T, F>(&self, call: impl FnOnce(Arc<Client>) -> F) -> Result<T, Error>
    where
        F: std::future::Future<Output = Result<T, RpcError>>,
    {
        self.check_interrupted()?;
        let answer = self.daemon.runtime.block_on(call(Arc::clone(&self.client)));
        answer.map_err(|error| self.failed(&explain(&error)))
    }

    /// Waits until the other host has done what was begun.
    fn wait(&self) -> Result<CopyState, Error> {
        loop {
            let state = self.call(|client| async move { client.copy_state().await })?;
            if let Some(why) = &state.failed {
                return Err(self.failed(why));
            }
            if !state.busy {
                return Ok(state);
            }
        }
    }

    fn tell(&mut self, now: bool) {
        if now || self.told.elapsed() >= TOLD_INTERVAL {
            self.told = Instant::now();
            self.job.tell(JobTold::Copying(self.progress));
        }
    }
}
