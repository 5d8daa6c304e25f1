//! The worker process: captures one domain, once.
//!
//! Three threads beside each other: the main one sits in libxl, one reads the
//! stream into the image, one answers the save helper's policy questions. The
//! engine's orders arrive by a fourth.
//!
//! Whatever goes wrong, the guest runs when the worker has ended: what libxl
//! suspended is resumed here; what a killed worker leaves, [`super::recover`]
//! finds.

use std::io::{self, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::pipe::PipeFlags;

use super::messages::{self, Command, CutTimes, Event};
use super::monitor::Monitors;
use super::orders::{Order, Orders};
use super::policy::{Policy, PolicyConfig, Step};
use super::policy_wire::{self, Decision, Said, Socket};
use super::recover::recover_domain;
use super::restart::{Look, Restart};
use super::xl::Xl;
use super::DomainFacts;
use crate::clock::now_ns;
use crate::image::{host_key, MemberHandle, MemberWriter, MemoryShare, Name, WriterOptions};
use crate::net::{self, Stopped as NetStopped, Watched};
use crate::sentence::sentence;
use crate::stream::{Ingest, Page, PageType, Place, Sink, XcHeader, PAGE_SIZE};

/// As much as an unprivileged pipe may hold: the helper rarely waits for us.
const PIPE_BYTES: usize = 1 << 20;
/// And at the cut, so that a guest doesn't wait for us either: the last pages, up to
/// this. Not where memory is limited, as what is in a pipe takes some as well.
const LAST_PIPE_BYTES_MAX: usize = 32 << 20;

/// For how many last pages memory is made ready: 64 MiB.
const READY_PAGES_MAX: u64 = 16_384;

/// Where the programs of c-shim are.
#[derive(Debug, Clone)]
pub struct Helpers {
    /// Runs the stock helper with the policy preloaded.
    pub save_helper: std::path::PathBuf,
    /// The shared object with the policy.
    pub save_policy: std::path::PathBuf,
    /// libxl's own save helper.
    pub stock_save_helper: std::path::PathBuf,
}

impl Helpers {
    /// All three stand beside each other in Xen's private programs' folder.
    pub fn in_folder(folder: &Path) -> Self {
        Self {
            save_helper: folder.join("vne-save-helper"),
            save_policy: folder.join("vne-save-policy.so"),
            stock_save_helper: folder.join("libxl-save-helper"),
        }
    }

    /// A missing file would show as a helper that dies for no reason.
    fn check(&self) -> Result<(), String> {
        for path in [
            &self.save_helper,
            &self.save_policy,
            &self.stock_save_helper,
        ] {
            if let Err(error) = std::fs::metadata(path) {
                return Err(format!(
                    "{}: {error} (is xl-vne installed whole?)",
                    path.display()
                ));
            }
        }
        Ok(())
    }
}

/// Runs the worker for the domain called `name`; `engine` is the socket to the
/// engine. Everything that can be told goes through it, so the result only
/// says whether to exit 0.
pub fn run(xl: &Xl, name: &str, helpers: &Helpers, engine: UnixStream) -> Result<(), String> {
    let said = prepare_and_capture(xl, name, helpers, &engine);
    if let Err(why) = &said {
        let failed = Event::Failed { why: why.clone() };
        // The engine may be the reason, and gone.
        if let Err(error) = messages::send(&engine, &failed) {
            log::debug!("cannot report a failure: {error}");
        }
    }
    said
}

fn prepare_and_capture(
    xl: &Xl,
    name: &str,
    helpers: &Helpers,
    engine: &UnixStream,
) -> Result<(), String> {
    helpers.check()?;
    let facts = xl.examine(name).map_err(|error| sentence(&error))?;
    let prepared = Event::Prepared {
        facts: Box::new(facts.clone()),
        xen_version: xl.xen_version(),
    };
    messages::send(engine, &prepared).map_err(|error| sentence(&error))?;

    let mut orders_in = BufReader::new(engine.try_clone().map_err(|error| sentence(&error))?);
    let first = messages::receive(&mut orders_in).map_err(|error| sentence(&error))?;
    let Some(Command::Precopy {
        directory,
        policy,
        final_buffer_bytes,
        memory_bytes,
        holds,
        disks,
    }) = first
    else {
        // Called off, or a dry run: nothing was touched.
        return Ok(());
    };
    let (socket, end) = Socket::pair().map_err(|error| sentence(&error))?;
    let helper = ToHelper {
        socket,
        end,
        rendezvous: take_rendezvous().map_err(|error| sentence(&error))?,
        wide: memory_bytes.is_none(),
    };
    set_helper_environment(helpers, &helper);
    let orders = Arc::new(Orders::new());
    follow_orders(orders_in, Arc::clone(&orders));
    let limited = memory_bytes.map(|bytes| MemoryShare::from_bytes(bytes).writer());
    let limited = limited.unwrap_or_default();
    let options = WriterOptions {
        held_bytes_max: final_buffer_bytes.min(limited.held_bytes_max),
        key: host_key().map_err(|error| sentence(&error))?,
        ..limited
    };
    let member = Name::new(&facts.name).map_err(|error| sentence(&error))?;
    let writer =
        MemberWriter::create(&directory, &member, &options).map_err(|error| sentence(&error))?;
    let watched = Watched::open(&holds).map_err(|error| sentence(&error))?;
    let (times, writer) = capture(
        xl,
        &facts,
        helper,
        engine,
        &orders,
        policy,
        (writer, watched, disks),
    )?;
    messages::send(engine, &Event::Cut(times)).map_err(|error| sentence(&error))?;

    if orders.wait_past_cut() == Order::Abort {
        return Ok(());
    }
    let stored = writer
        .finish(&facts.config_json)
        .map_err(|error| sentence(&error))?;
    if disks {
        let settled = orders.wait_settled();
        if settled.map_err(|why| format!("{}: {why}", facts.name))? == Order::Abort {
            return Ok(());
        }
    }
    messages::send(engine, &Event::Stored(Box::new(stored))).map_err(|error| sentence(&error))
}

/// Reads the engine's orders in a thread of its own. The engine's end is an
/// order too: abort.
fn follow_orders(mut orders_in: BufReader<UnixStream>, orders: Arc<Orders>) {
    std::thread::spawn(move || loop {
        match messages::receive(&mut orders_in) {
            Ok(Some(Command::Approach)) => orders.advance(Order::Approach),
            Ok(Some(Command::Cut)) => orders.advance(Order::Cut),
            Ok(Some(Command::Disks { why })) => orders.disks(Order::Disks, why),
            Ok(Some(Command::Settled { why })) => orders.disks(Order::Settled, why),
            Ok(Some(Command::Finalise)) => orders.advance(Order::Finalise),
            Ok(Some(Command::Precopy { .. })) => log::warn!("a second order to begin"),
            Ok(Some(Command::Abort) | None) | Err(_) => {
                orders.advance(Order::Abort);
                return;
            }
        }
    });
}

/// The ways to the save helper.
struct ToHelper {
    socket: Socket,
    /// Its end of that, to inherit.
    end: OwnedFd,
    /// What it meets the others by, to inherit.
    rendezvous: Option<OwnedFd>,
    /// Whether the stream's pipe may become large.
    wide: bool,
}

/// Saves the domain live and sets it running again.
fn capture(
    xl: &Xl,
    facts: &DomainFacts,
    helper: ToHelper,
    engine: &UnixStream,
    orders: &Arc<Orders>,
    policy: PolicyConfig,
    (writer, watched, disks): (MemberWriter, Watched, bool),
) -> Result<(CutTimes, MemberWriter), String> {
    let (stream_out, stream_in) = stream_pipe().map_err(|error| sentence(&error))?;
    let last_pages = LastPages {
        writer: writer.handle(),
        done_ns: Arc::default(),
    };
    let watched = Arc::new(Mutex::new(watched));
    let look = Arc::new(Look::default());
    let restart = Restart::new(xl, facts, orders, (&look, &watched), disks);
    let monitors = Arc::new(Monitors::find(&facts.name));
    let asked = Arc::new(AtomicBool::new(false));
    let wide = match helper.wide {
        true => Some(stream_in.try_clone().map_err(|error| sentence(&error))?),
        false => None,
    };
    let asker = Asker {
        monitors: Arc::clone(&monitors),
        socket: helper.socket,
        policy: Policy::new(policy),
        orders: Arc::clone(orders),
        last_pages: last_pages.clone(),
        stream: wide,
        engine: engine.try_clone().map_err(|error| sentence(&error))?,
        times: CutTimes::default(),
        asked: Arc::clone(&asked),
        stopped: false,
        rendezvous: helper.rendezvous,
        watched: Arc::clone(&watched),
        look: Arc::clone(&look),
        at_stop: None,
    };
    let asker = std::thread::spawn(move || asker.serve());
    let sink = Observed {
        writer,
        pages_done_ns: Arc::clone(&last_pages.done_ns),
        orders: Arc::clone(orders),
        restart: &restart,
    };

    let (saved, restarted, read) = std::thread::scope(|scope| {
        let reader = scope.spawn(move || read_stream(stream_out, sink));
        let saved = xl.suspend_live(facts.domid, stream_in.as_fd());
        // The helper may have been killed while the asker hovers for it.
        orders.call_over();
        let restarted = match &saved {
            Ok(()) => Ok(restart.saved()),
            // The helper may have died between asking the guest and stopping it.
            Err(_) => Err(recover_domain(
                xl,
                facts.domid,
                &facts.uuid,
                asked.load(Ordering::Acquire),
            )),
        };
        monitors.let_go();
        // Both threads end with what they read from: the stream, the helper.
        drop(stream_in);
        drop(helper.end);
        (saved, restarted, join(reader.join()))
    });
    let asker = join(asker.join());

    let resumed = match &restarted {
        Ok(restarted) => restarted.resumed.as_ref(),
        Err(recovered) => recovered.as_ref(),
    };
    resumed.map_err(|error| {
        format!(
            "{}: IT MAY STILL BE SUSPENDED, see 'xl list': {error}",
            facts.name
        )
    })?;
    // The reader's own failure is the cause of libxl's.
    let (writer, stream_bytes) = read?;
    let asker = asker?;
    let restarted = match (saved, restarted) {
        (Ok(()), Ok(restarted)) => restarted,
        _ if orders.now() == Order::Abort => return Err(format!("{}: called off", facts.name)),
        (Err(error), _) => return Err(format!("{}: {error}", facts.name)),
        (Ok(()), Err(_)) => return Err(format!("{}: it wasn't resumed", facts.name)),
    };
    if !asker.stopped {
        return Err(format!("{}: saved without a suspend", facts.name));
    }
    if !restarted.looked {
        return Err(format!(
            "{}: what it had sent by its cut couldn't be counted in time (is dom0 very busy?)",
            facts.name
        ));
    }
    let captured = restarted.captured;
    captured.map_err(|why| format!("{}: {why}", facts.name))?;
    let network = |error| format!("{}: {}", facts.name, sentence(&error));
    let counted = asker.at_stop.transpose().map_err(network)?;
    let counted = counted.map_or(0, |stopped| stopped.sent);
    let uncounted = restarted.sent.map_err(network)?.saturating_sub(counted);
    if uncounted > 0 {
        return Err(format!(
            "{}: {uncounted} frames that it had sent before its cut came too late to be recorded \
             (is dom0 short of processors, or its vif's rate limited?)",
            facts.name
        ));
    }
    let times = CutTimes {
        pages_done_ns: last_pages.done_ns.load(Ordering::Relaxed),
        final_pages: last_pages.writer.pages_final(),
        saved_ns: restarted.saved_ns,
        disks_ns: restarted.disks_ns,
        resumed_ns: restarted.resumed_ns,
        stream_bytes,
        ..asker.times
    };
    Ok((times, writer))
}

fn stream_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (out, inn) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    if let Err(error) = rustix::pipe::fcntl_setpipe_size(&inn, PIPE_BYTES) {
        // Slower, not wrong: the host limits what pipes may hold.
        log::debug!("cannot enlarge the stream's pipe: {error}");
    }
    Ok((out, inn))
}

/// Must come before any other thread is started: the environment is not safe
/// to change beside them.
fn set_helper_environment(helpers: &Helpers, helper: &ToHelper) {
    use std::os::fd::AsRawFd;
    let number = |fd: &OwnedFd| fd.as_raw_fd().to_string();
    std::env::set_var("LIBXL_SAVE_HELPER", &helpers.save_helper);
    std::env::set_var("VNE_STOCK_SAVE_HELPER", &helpers.stock_save_helper);
    std::env::set_var("VNE_SAVE_POLICY", &helpers.save_policy);
    std::env::set_var(policy_wire::FD_ENV, number(&helper.end));
    if let Some(end) = &helper.rendezvous {
        std::env::set_var(policy_wire::RENDEZVOUS_FD_ENV, number(end));
    }
}

fn join<T>(joined: std::thread::Result<Result<T, String>>) -> Result<T, String> {
    joined.unwrap_or_else(|_| Err(String::from("a thread of the worker panicked")))
}

/// What the threads share about the pages that are sent while the guest stands.
#[derive(Clone)]
struct LastPages {
    writer: MemberHandle,
    /// When the last one had been read; 0 until then.
    done_ns: Arc<AtomicU64>,
}

/// Reads the stream; what it comes to is the image, and how many bytes it was.
fn read_stream(stream: OwnedFd, mut sink: Observed<'_>) -> Result<(MemberWriter, u64), String> {
    let read = Ingest::new(std::fs::File::from(stream))
        .run(&mut sink)
        .map_err(|error| sentence(&error))?;
    Ok((sink.writer, read.bytes))
}

/// The image writer, with an eye on the clock and on the engine's orders.
struct Observed<'a> {
    writer: MemberWriter,
    pages_done_ns: Arc<AtomicU64>,
    orders: Arc<Orders>,
    restart: &'a Restart<'a>,
}

/// Why the reader stops before the stream's end. The helper then finds its
/// pipe closed, gives up, and the guest runs on.
#[derive(Debug, thiserror::Error)]
enum Stopped {
    /// The store can't take it.
    #[error(transparent)]
    Image(#[from] crate::image::Error),
    /// The engine wants no more of it. The first round takes seconds, and the
    /// policy isn't asked meanwhile.
    #[error("called off")]
    CalledOff,
}

impl Sink for Observed<'_> {
    type Error = Stopped;

    fn xl_header(&mut self, legacy: bool) -> Result<(), Self::Error> {
        Ok(self.writer.xl_header(legacy)?)
    }

    fn xc_header(&mut self, header: &XcHeader) -> Result<(), Self::Error> {
        Ok(self.writer.xc_header(header)?)
    }

    fn record(&mut self, place: Place, record_type: u32, body: &[u8]) -> Result<(), Self::Error> {
        if place == Place::XcAfter && self.pages_done_ns.load(Ordering::Relaxed) == 0 {
            self.pages_done_ns.store(now_ns(), Ordering::Relaxed);
        }
        Ok(self.writer.record(place, record_type, body)?)
    }

    fn page(
        &mut self,
        pfn: u64,
        page_type: PageType,
        data: Option<&Page>,
    ) -> Result<(), Self::Error> {
        // A look at a flag for every 64th page costs nothing that shows.
        if pfn % 64 == 0 && self.orders.now() == Order::Abort {
            return Err(Stopped::CalledOff);
        }
        Ok(self.writer.page(pfn, page_type, data)?)
    }

    fn verify_page(
        &mut self,
        pfn: u64,
        page_type: PageType,
        data: Option<&Page>,
    ) -> Result<(), Self::Error> {
        Ok(self.writer.verify_page(pfn, page_type, data)?)
    }

    fn xc_end(&mut self) -> Result<(), Self::Error> {
        self.restart.stream_over();
        Ok(())
    }

    fn end(&mut self) -> Result<(), Self::Error> {
        Ok(self.writer.end()?)
    }
}

/// Answers the save helper's questions.
struct Asker {
    monitors: Arc<Monitors>,
    socket: Socket,
    policy: Policy,
    orders: Arc<Orders>,
    last_pages: LastPages,
    /// The stream's pipe until it's made larger, if it may be. The reader waits until this is closed
    /// as well.
    stream: Option<OwnedFd>,
    engine: UnixStream,
    times: CutTimes,
    /// The guest may have been asked to suspend.
    asked: Arc<AtomicBool>,
    stopped: bool,
    /// Where members meet at the cut, until the helper has it.
    rendezvous: Option<OwnedFd>,
    watched: Arc<Mutex<Watched>>,
    look: Arc<Look>,
    /// Its network when it had stopped.
    at_stop: Option<Result<NetStopped, net::Error>>,
}

/// The end of the rendezvous that came as stdout, for the helper to inherit;
/// stdout then is nobody's.
fn take_rendezvous() -> io::Result<Option<OwnedFd>> {
    use rustix::fs::FileType;
    let stdout = rustix::stdio::stdout();
    let kind = FileType::from_raw_mode(rustix::fs::fstat(stdout)?.st_mode);
    if kind != FileType::Fifo {
        return Ok(None);
    }
    let end = rustix::io::dup(stdout)?;
    let null = std::fs::File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(null)?;
    Ok(Some(end))
}

impl Asker {
    fn serve(mut self) -> Result<Self, String> {
        loop {
            let message = match self.socket.receive() {
                Ok(Some(message)) => message,
                Ok(None) => {
                    self.stream = None;
                    return Ok(self);
                }
                Err(error) => return Err(format!("the save helper's socket: {error}")),
            };
            match message.said {
                Said::Ask {
                    iteration,
                    dirty_pages,
                } => {
                    // The helper has it by now, and is the one who leaves it.
                    self.rendezvous = None;
                    let decision = self.decide(iteration, dirty_pages, message.time_ns);
                    if decision == Decision::StopAndCopy {
                        self.asked.store(true, Ordering::Release);
                        self.monitors.stop();
                        self.last_pages.writer.enter_final();
                    }
                    if let Err(error) = self.socket.answer(decision) {
                        log::debug!("the save helper's socket: {error}");
                    }
                }
                Said::Suspending => self.times.requested_ns = message.time_ns,
                Said::Suspended { stopped } => {
                    self.times.suspended_ns = message.time_ns;
                    self.stopped = stopped;
                    if stopped {
                        self.look_at_stop();
                        self.look.done();
                    }
                }
                Said::Saved { failed_errno } => {
                    if let Some(errno) = failed_errno {
                        let error = io::Error::from_raw_os_error(errno);
                        log::info!("the save helper stopped: {error}");
                    }
                }
            }
        }
    }

    /// Has the stream's pipe hold the last pages, of which there were `pages` in the
    /// last round.
    fn widen(&mut self, pages: u64) {
        let Some(stream) = self.stream.take() else {
            return;
        };
        let bytes = usize::try_from(pages).unwrap_or(usize::MAX);
        let bytes = bytes.saturating_mul(2 * PAGE_SIZE);
        let bytes = bytes.clamp(PIPE_BYTES, LAST_PIPE_BYTES_MAX);
        if let Err(error) = rustix::pipe::fcntl_setpipe_size(&stream, bytes) {
            // Slower, not wrong.
            log::debug!("cannot enlarge the stream's pipe: {error}");
        }
    }

    /// Frames may go as soon as the engine knows of this for all members.
    fn look_at_stop(&mut self) {
        let watched = self.watched.lock();
        let mut watched = watched.unwrap_or_else(PoisonError::into_inner);
        let seen = watched.stopped();
        if let Ok(seen) = &seen {
            let told = Event::Stopped(seen.clone());
            if let Err(error) = messages::send(&self.engine, &told) {
                log::debug!("cannot report the cut: {error}");
            }
        } else {
            // Of a cut that isn't reported nobody captures disks.
            self.orders.disks(Order::Disks, None);
        }
        self.at_stop = Some(seen);
    }

    fn decide(&mut self, iteration: u32, dirty_pages: Option<u64>, now: u64) -> Decision {
        if let Some(pages) = dirty_pages {
            // Whatever the order, these have to be sent: they are the oldest.
            self.policy.round_begins(iteration, pages, now);
            return match self.orders.now() {
                Order::Abort => Decision::Abort,
                _ => Decision::Continue,
            };
        }
        let (round, step) = self.policy.round_ends(now);
        if let Some(round) = round {
            let told = Event::Round {
                round,
                converged: self.policy.converged(),
            };
            if messages::send(&self.engine, &told).is_err() {
                return Decision::Abort;
            }
            // What gets dirty until the guest stands still comes on top.
            let final_pages = round.pages.saturating_mul(2);
            if round.iteration > 0 && final_pages <= READY_PAGES_MAX {
                self.last_pages.writer.expect_final(final_pages);
            }
        }
        let mut order = match step {
            Step::WaitUntil { time_ns } => self.orders.wait_past(Order::Precopy, time_ns),
            Step::Continue | Step::Near => self.orders.now(),
        };
        if order == Order::Approach && step == Step::Near {
            self.widen(round.map_or(0, |round| round.pages));
            if messages::send(&self.engine, &Event::Near).is_err() {
                return Decision::Abort;
            }
            order = self.orders.wait_past(Order::Approach, u64::MAX);
        } else if order == Order::Approach {
            self.policy.approach();
        }
        match order {
            Order::Precopy | Order::Approach => Decision::Continue,
            Order::Cut => Decision::StopAndCopy,
            // The others can't come before a cut.
            Order::Disks | Order::Finalise | Order::Settled | Order::Abort => Decision::Abort,
        }
    }
}
