//! Stores pages in a pack, beside whoever hands them in.
//!
//! ```text
//!  add ─► batch ─► queue, bounded ─► threads: hash │ in turn: known already? │ compress ─► file
//! ```
//!
//! Threads take batches from the queue. What has to be done in the pages' order,
//! finding those that are stored already and numbering the others, is little, and
//! they do it in turn; hashing and compressing they do beside each other.
//!
//! While the guest is suspended nothing of this happens: who hands in pages isn't
//! kept waiting, and the threads leave the processors and the disk to others.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::bits::Bits;
use super::codec::Compressor;
use super::error::Error;
use super::known::{Fingerprints, Known, Location};
use super::pack::{
    check_of, hash_page, seal_frame, Frame, Hash, Pack, Table, FRAME_PAGES, HEADER_BYTES,
};
use super::placing::{Full, InTurn};
use super::seal::Sealer;
use super::writer::WriterOptions;
use super::Result;
use crate::priority;
use crate::random;
use crate::stream::{Page, PAGE_SIZE};

/// Pages that were handed in together.
struct Batch {
    /// How many were before it.
    turn: u64,
    pages: Vec<u8>,
}

/// What the threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Work,
    /// The guest is suspended.
    Rest,
    /// What is in the queue is all there is.
    Finish,
    /// All is lost, or nobody wants it any more.
    Stop,
}

struct Queue {
    batches: VecDeque<Batch>,
    mode: Mode,
    error: Option<Error>,
}

struct Out {
    file: File,
    end: u64,
    frames: Vec<Frame>,
}

struct Shared {
    queue: Mutex<Queue>,
    /// The queue has become shorter, longer, or its mode has changed.
    changed: Condvar,
    in_turn: Mutex<InTurn>,
    next_turn: Condvar,
    out: Mutex<Out>,
    /// If the pack is encrypted.
    sealer: Option<Sealer>,
    /// Batches that wait, at most.
    queue_max: usize,
    path: PathBuf,
}

/// Panics are caught where the thread is joined; until then what they left is
/// looked at by nobody.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Tells the threads of a [`Packer`] to rest.
#[derive(Clone)]
pub(crate) struct Rest(Arc<Shared>);

impl std::fmt::Debug for Rest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rest")
    }
}

impl Rest {
    /// From its return on nothing is written and nobody is kept waiting. Waits
    /// for one frame's write at most.
    pub(crate) fn begin(&self) {
        let mut queue = lock(&self.0.queue);
        if queue.mode == Mode::Work {
            queue.mode = Mode::Rest;
        }
        drop(queue);
        self.0.changed.notify_all();
        drop(lock(&self.0.out));
    }
}

/// Pages on their way into a pack.
pub(crate) struct Packer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    batch: Vec<u8>,
    /// Batches that couldn't be put into the queue while the guest is suspended.
    kept: VecDeque<Batch>,
    turns: u64,
    added: u32,
    nonce: [u8; 16],
}

/// A pack that is complete but for its table.
pub(crate) struct Packed {
    pub file: File,
    pub path: PathBuf,
    pub table: Table,
    /// Where its frames end.
    pub end: u64,
    /// Where each page that was handed in is.
    pub locations: Vec<Location>,
    /// What those locations count.
    pub known: Known,
    /// If it's encrypted.
    pub sealer: Option<Sealer>,
}

impl Packer {
    /// Begins a pack in `file`, which is empty; `path` is for errors.
    pub(crate) fn new(
        file: File,
        path: &Path,
        known: Known,
        options: &WriterOptions,
    ) -> Result<Self> {
        let nonce = random::bytes().map_err(Error::io("make a name for", path))?;
        let sealer = known.folder().vault().new_sealer(path)?;
        file.write_all_at(&Table::header(&nonce, sealer.as_ref()), 0)
            .map_err(Error::io("write", path))?;
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                batches: VecDeque::new(),
                mode: Mode::Work,
                error: None,
            }),
            changed: Condvar::new(),
            in_turn: Mutex::new(InTurn {
                turn: 0,
                known,
                learnt: false,
                prints: Fingerprints::default(),
                hashes: Vec::new(),
                locations: Vec::new(),
                open: Vec::new(),
            }),
            next_turn: Condvar::new(),
            out: Mutex::new(Out {
                file,
                end: HEADER_BYTES,
                frames: Vec::new(),
            }),
            sealer,
            queue_max: (options.queue_bytes_max / (FRAME_PAGES * PAGE_SIZE)).max(1),
            path: path.to_owned(),
        });
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let mut threads = Vec::new();
        for _ in 0..count.clamp(1, options.threads_max.max(1)) {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(String::from("packer"));
            let thread = thread.spawn(move || {
                priority::background();
                let worked = Worker::new(&shared).and_then(Worker::work);
                if let Err(error) = worked {
                    shared.fail(error);
                }
            });
            match thread {
                Ok(thread) => threads.push(thread),
                // Fewer do as well.
                Err(_) if !threads.is_empty() => break,
                Err(error) => return Err(Error::io("start a thread for", path)(error)),
            }
        }
        Ok(Packer {
            shared,
            threads,
            batch: Vec::new(),
            kept: VecDeque::new(),
            turns: 0,
            added: 0,
            nonce,
        })
    }

    /// The switch for other threads.
    pub(crate) fn rest(&self) -> Rest {
        Rest(Arc::clone(&self.shared))
    }

    /// Takes a page; its number among those that were handed in. Waits when the
    /// queue is full, but not once the guest is suspended.
    ///
    /// # Errors
    ///
    /// What the threads have met.
    pub(crate) fn add(&mut self, page: &Page) -> Result<u32> {
        self.batch.extend_from_slice(page);
        let number = self.added;
        self.added += 1;
        if self.batch.len() >= FRAME_PAGES * PAGE_SIZE {
            self.send()?;
        }
        Ok(number)
    }

    /// Ends the rest: the guest runs.
    pub(crate) fn work(&mut self) -> Result<()> {
        let mut queue = lock(&self.shared.queue);
        if queue.mode == Mode::Rest {
            queue.mode = Mode::Work;
        }
        drop(queue);
        self.shared.changed.notify_all();
        while let Some(batch) = self.kept.pop_front() {
            self.put(batch)?;
        }
        Ok(())
    }

    fn send(&mut self) -> Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let next = Vec::with_capacity(FRAME_PAGES * PAGE_SIZE);
        let batch = Batch {
            turn: self.turns,
            pages: std::mem::replace(&mut self.batch, next),
        };
        self.turns += 1;
        self.put(batch)
    }

    fn put(&mut self, batch: Batch) -> Result<()> {
        let mut queue = lock(&self.shared.queue);
        loop {
            match queue.mode {
                Mode::Stop => {
                    let lost = || Error::unstorable("its pages", "a thread of the packer is lost");
                    return Err(queue.error.take().unwrap_or_else(lost));
                }
                Mode::Rest => {
                    drop(queue);
                    self.kept.push_back(batch);
                    return Ok(());
                }
                Mode::Work | Mode::Finish if queue.batches.len() < self.shared.queue_max => break,
                Mode::Work | Mode::Finish => queue = wait(&self.shared.changed, queue),
            }
        }
        queue.batches.push_back(batch);
        drop(queue);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Waits until all pages are in the file.
    ///
    /// # Errors
    ///
    /// What the threads have met.
    pub(crate) fn finish(mut self) -> Result<Packed> {
        self.work()?;
        self.send()?;
        let mut queue = lock(&self.shared.queue);
        if queue.mode != Mode::Stop {
            queue.mode = Mode::Finish;
        }
        drop(queue);
        self.shared.changed.notify_all();
        let mut panicked = false;
        for thread in self.threads.drain(..) {
            panicked |= thread.join().is_err();
        }
        if let Some(error) = lock(&self.shared.queue).error.take() {
            return Err(error);
        }
        if panicked {
            let problem = "a thread of the packer panicked";
            return Err(Error::unstorable("its pages", problem));
        }
        self.collect()
    }

    /// What the threads have left, when they are gone.
    fn collect(&mut self) -> Result<Packed> {
        let shared = Arc::clone(&self.shared);
        let mut in_turn = lock(&shared.in_turn);
        let mut last = Vec::new();
        in_turn.close_frame(&mut last);
        for full in &last {
            Worker::new(&shared)?.write(full)?;
        }
        let mut out = lock(&shared.out);
        let mut frames = std::mem::take(&mut out.frames);
        frames.sort_by_key(|frame| frame.first);
        let hashes = std::mem::take(&mut in_turn.hashes);
        let file = out.file.try_clone();
        let known = Known::new(in_turn.known.folder(), 0);
        Ok(Packed {
            file: file.map_err(Error::io("open", &shared.path))?,
            path: shared.path.clone(),
            table: Table {
                nonce: self.nonce,
                frames,
                present: Bits::all(hashes.len()),
                hashes,
            },
            end: out.end,
            locations: std::mem::take(&mut in_turn.locations),
            known: std::mem::replace(&mut in_turn.known, known),
            sealer: shared.sealer.clone(),
        })
    }
}

impl Drop for Packer {
    fn drop(&mut self) {
        lock(&self.shared.queue).mode = Mode::Stop;
        self.shared.wake();
        for thread in self.threads.drain(..) {
            // It has nothing left to say.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packer of {}", self.shared.path.display())
    }
}

impl Shared {
    fn fail(&self, error: Error) {
        let mut queue = lock(&self.queue);
        queue.mode = Mode::Stop;
        queue.error.get_or_insert(error);
        drop(queue);
        self.wake();
    }

    /// Has all threads see that the mode has changed.
    fn wake(&self) {
        self.changed.notify_all();
        // Under the lock, so that nobody looks before and waits after.
        let _in_turn = lock(&self.in_turn);
        self.next_turn.notify_all();
    }

    fn is_stopped(&self) -> bool {
        lock(&self.queue).mode == Mode::Stop
    }

    /// The next batch; none at the end.
    fn next(&self) -> Option<Batch> {
        let mut queue = lock(&self.queue);
        loop {
            match queue.mode {
                Mode::Stop => return None,
                Mode::Rest => {}
                Mode::Work | Mode::Finish => {
                    if let Some(batch) = queue.batches.pop_front() {
                        drop(queue);
                        self.changed.notify_all();
                        return Some(batch);
                    }
                    if queue.mode == Mode::Finish {
                        return None;
                    }
                }
            }
            queue = wait(&self.changed, queue);
        }
    }

    /// Returns, with the file, when it may be written; none if it's too late.
    fn writable(&self) -> Option<MutexGuard<'_, Out>> {
        loop {
            let out = lock(&self.out);
            let queue = lock(&self.queue);
            match queue.mode {
                Mode::Work | Mode::Finish => return Some(out),
                Mode::Stop => return None,
                Mode::Rest => {
                    drop(out);
                    drop(wait(&self.changed, queue));
                }
            }
        }
    }
}

struct Worker<'a> {
    shared: &'a Shared,
    compressor: Compressor,
    packed: Vec<u8>,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared) -> Result<Self> {
        Ok(Worker {
            shared,
            compressor: Compressor::new(&shared.path)?,
            packed: Vec::new(),
        })
    }

    fn work(mut self) -> Result<()> {
        while let Some(batch) = self.shared.next() {
            let pages = batch.pages.chunks_exact(PAGE_SIZE);
            let hashes: Vec<Hash> = pages.map(hash_page).collect();
            let mut full = Vec::new();
            let mut in_turn = lock(&self.shared.in_turn);
            while in_turn.turn != batch.turn {
                if self.shared.is_stopped() {
                    return Ok(());
                }
                in_turn = wait(&self.shared.next_turn, in_turn);
            }
            in_turn.learn()?;
            in_turn.place(&batch.pages, &hashes, &mut full);
            in_turn.turn += 1;
            drop(in_turn);
            self.shared.next_turn.notify_all();
            for full in &full {
                self.write(full)?;
            }
        }
        Ok(())
    }

    fn write(&mut self, full: &Full) -> Result<()> {
        let path = &self.shared.path;
        self.compressor.pack(&full.pages, &mut self.packed, path)?;
        seal_frame(&mut self.packed, self.shared.sealer.as_ref(), path)?;
        let check = check_of(&self.packed);
        let Some(mut out) = self.shared.writable() else {
            return Ok(());
        };
        let offset = out.end;
        out.file
            .write_all_at(&self.packed, offset)
            .map_err(Error::io("write", path))?;
        out.end += self.packed.len() as u64;
        out.frames.push(Frame {
            offset,
            length: self.packed.len() as u32, // within FRAME_LENGTH_MAX
            first: full.first,
            count: (full.pages.len() / PAGE_SIZE) as u32,
            check,
        });
        Ok(())
    }
}

impl Packed {
    /// Puts the table behind the frames and makes the file last: a pack, but for
    /// its name.
    pub(crate) fn close(&self) -> Result<()> {
        let failed = Error::io("write", &self.path);
        let sealer = self.sealer.as_ref();
        let bytes = self.table.encode(self.end, sealer, &self.path)?;
        self.file.write_all_at(&bytes, self.end).map_err(failed)?;
        let failed = Error::io("sync", &self.path);
        self.file.sync_all().map_err(failed)
    }

    /// For rewriting: it's readable though it has no table in the file.
    pub(crate) fn as_pack(&self) -> Result<Pack> {
        let file = self
            .file
            .try_clone()
            .map_err(Error::io("open", &self.path))?;
        Ok(Pack {
            path: self.path.clone(),
            file,
            table: self.table.clone(),
            sealer: self.sealer.clone(),
        })
    }
}
