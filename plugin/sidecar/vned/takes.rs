//! Takes: those that this host leads, and its side of all.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use super::super::acting::{self, HereLink, Which};
use super::super::error::Error;
use super::super::journal::Register;
use super::super::lead::{self, hosts, lead, plan, Lead, Link, TakeRequest, Taken};
use super::super::peers::{Remote, RemoteLink};
use super::super::restore;
use super::super::rpc::{InDoubt, JobDone, JobId, SnapshotRef};
use super::super::take::sweep;
use super::super::vote::{self, Vote};
use super::super::wire::{Attached, News, Order, Plan};
use super::jobs::Job;
use super::{lock, Daemon};
use crate::clock::now_ns;
use crate::cut::{self, unattended, Host, HostAction, HostInput, HostLimits, Reply, TakeId};
use crate::image::{self, Manifest, Name, Store, StoreId};
use crate::sentence::sentence;

/// Sides that this host may have at a time for one leader.
const SIDES_MAX: usize = 16;
/// Members on this host in one take.
const MEMBERS_MAX: usize = 1024;
/// What a peer may ask for at most: longer than any of ours, in ns.
const LIMITS_MAX: HostLimits = HostLimits {
    hold_ns: 30_000_000_000,
    lease_ns: 300_000_000_000,
    ask_ns: 60_000_000_000,
};
const HOLD_BYTES_MAX: u32 = 1 << 30;
/// How often an outcome that isn't known is asked for.
const ASK: Duration = Duration::from_secs(1);

/// A take that this host leads.
struct Leading {
    vne: Name,
    hosts: Vec<Name>,
    to: Sender<lead::Heard>,
    since: Instant,
}

/// This host's side of a take.
struct Side {
    leader: Name,
    snapshot: SnapshotRef,
    link: HereLink,
    in_doubt: Arc<AtomicBool>,
}

/// A part that waits for its outcome after a restart.
struct Doubt {
    leader: Name,
    snapshot: SnapshotRef,
    to: Sender<Order>,
}

/// All takes that go on.
#[derive(Default)]
pub(super) struct Takes {
    leading: Mutex<HashMap<TakeId, Leading>>,
    sides: Mutex<HashMap<TakeId, Side>>,
    /// Those that are being started.
    starting: Mutex<HashSet<TakeId>>,
    doubts: Mutex<HashMap<TakeId, Doubt>>,
    stopping: AtomicBool,
}

impl Takes {
    /// Whether nothing goes on.
    pub fn is_empty(&self) -> bool {
        lock(&self.leading).is_empty() && lock(&self.sides).is_empty()
    }

    /// Ends all sides, as far as they may end. Those led here end with their
    /// leaders.
    pub fn stop_all(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        for side in lock(&self.sides).values() {
            let why = String::from("vned is being stopped");
            // One that has ended needn't be told.
            let _ = side.link.0.send(acting::Heard::Stop(why));
        }
    }

    /// Parts whose outcome isn't known.
    pub fn in_doubt(&self) -> Vec<InDoubt> {
        let in_doubt = |snapshot: &SnapshotRef, leader: &Name| InDoubt {
            snapshot: snapshot.to_string(),
            leader: leader.to_string(),
        };
        let sides = lock(&self.sides);
        let sides = sides
            .values()
            .filter(|side| side.in_doubt.load(Ordering::Relaxed));
        let mut all: Vec<_> = sides
            .map(|side| in_doubt(&side.snapshot, &side.leader))
            .collect();
        let doubts = lock(&self.doubts);
        all.extend(
            doubts
                .values()
                .map(|doubt| in_doubt(&doubt.snapshot, &doubt.leader)),
        );
        all
    }
}

/// Takes its entry out of a table when the work is over, however it ends.
struct Entered<F: FnMut()>(F);

impl<F: FnMut()> Drop for Entered<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl Daemon {
    // Leading.

    /// Starts a take as a job.
    pub(super) fn start_take(self: &Arc<Self>, request: TakeRequest) -> Result<JobId, Error> {
        let (said, heard) = mpsc::channel();
        let interrupted = Mutex::new(said.clone());
        let interrupt = move || {
            let _ = lock(&interrupted).send(lead::Heard::Interrupted);
        };
        let daemon = Arc::clone(self);
        let work = move |job: &Arc<Job>| {
            let taken = daemon.lead_take(&request, said, &heard, job);
            match taken {
                Ok(taken) => JobDone::Take(taken),
                Err(error) => JobDone::Failed(sentence(&error)),
            }
        };
        self.jobs
            .start(interrupt, work)
            .map_err(Error::start("start a thread"))
    }

    fn lead_take(
        self: &Arc<Self>,
        request: &TakeRequest,
        said: Sender<lead::Heard>,
        heard: &mpsc::Receiver<lead::Heard>,
        job: &Arc<Job>,
    ) -> Result<Taken, Error> {
        request.check()?;
        let here = self.here();
        let hosts = hosts(&here, request);
        let mut links: Vec<Box<dyn Link>> = Vec::new();
        let mut remotes = Vec::new();
        for (index, host) in hosts.iter().enumerate().skip(1) {
            let remote = self.peer_for(host, &request.vne)?;
            remotes.push(Arc::clone(&remote));
            let to = said.clone();
            let refused = move |news| drop(to.send(lead::Heard::News(index, Box::new(news))));
            links.push(Box::new(RemoteLink::new(remote, refused)));
        }
        let register = Register::open(&self.run_dir)?;
        sweep(&self.program, &register)?;
        let store = self.store(&request.vne)?;
        let opened = Store::open(&store)?;
        let id = opened.free_id(&request.vne, SystemTime::now())?;
        let decided_in = match request.dry_run {
            true => None,
            false => Some(opened.ensure_id()?),
        };
        let take = TakeId(number()?);
        let _entered = self.enter_leading(take, request, &hosts, &said)?;

        let plan = plan(request, &id, decided_in.as_ref(), &here, &here);
        let to = said.clone();
        let say = move |news| drop(to.send(lead::Heard::News(0, Box::new(news))));
        let (which, place) = (Which::new(take)?, self.place(store));
        let side = acting::start(place, plan, which, say)?;
        links.insert(0, Box::new(side.link.clone()));
        let decide = side.link.decider(said);
        drop(side.link);
        let lead_it = Lead {
            request,
            take,
            id,
            store: decided_in,
            links,
            decide,
        };
        let result = lead(&lead_it, &here, heard, &mut Arc::clone(job));
        drop(lead_it);
        // All is undone here when it has ended.
        let _ = side.thread.join();
        result.map_err(|error| with_troubles(error, &remotes))
    }

    /// A peer that acts for this host in a VNE.
    pub(super) fn peer_for(&self, host: &Name, vne: &Name) -> Result<Arc<super::Remote>, Error> {
        let unknown = |what: &str| {
            Error::Failed(format!(
                "host '{host}' {what}: xl vne-snapshot peer add {host} ADDRESS FINGERPRINT --vne \
                 {vne}"
            ))
        };
        if self.setup(|setup| setup.identity.is_none()) {
            return Err(Error::Failed(String::from(
                "this host has no identity to show to its peers: xl vne-snapshot peer init",
            )));
        }
        let remote = self
            .remote(host)
            .ok_or_else(|| unknown("is no peer of this one"))?;
        if remote.peer.may(vne) {
            Ok(remote)
        } else {
            Err(unknown(&format!("isn't listed for VNE '{vne}'")))
        }
    }

    fn enter_leading(
        self: &Arc<Self>,
        take: TakeId,
        request: &TakeRequest,
        hosts: &[Name],
        to: &Sender<lead::Heard>,
    ) -> Result<impl Drop, Error> {
        self.not_stopping()?;
        let mut leading = lock(&self.takes.leading);
        if let Some(other) = leading.values().find(|other| other.vne == request.vne) {
            return Err(Error::Failed(format!(
                "a take of VNE '{}' has been running for {} s, led by this host",
                request.vne,
                other.since.elapsed().as_secs()
            )));
        }
        leading.insert(
            take,
            Leading {
                vne: request.vne.clone(),
                hosts: hosts.to_vec(),
                to: to.clone(),
                since: Instant::now(),
            },
        );
        let daemon = Arc::clone(self);
        Ok(Entered(move || {
            lock(&daemon.takes.leading).remove(&take);
        }))
    }

    // News.

    /// To the take that it's about, if that goes on; else it comes back.
    pub(super) fn pass_on_news(&self, peer: &Name, news: News) -> Option<News> {
        let leading = lock(&self.takes.leading);
        let Some(take) = leading.get(&news.take()) else {
            return Some(news);
        };
        if let Some(host) = take.hosts.iter().position(|host| host == peer) {
            // A leader that has ended doesn't want to know.
            let _ = take.to.send(lead::Heard::News(host, Box::new(news)));
        }
        None
    }

    /// About a take that nobody leads here (any more).
    pub(super) fn news(self: &Arc<Self>, peer: &Name, news: News) -> Result<(), Error> {
        let News::Said { message, attached } = news else {
            return Ok(());
        };
        let committed = match attached {
            Attached::Part { vne, id, store, .. } => {
                if !self.may(peer, &vne) {
                    // It isn't told, and presumes nothing: the admin may list it
                    // again.
                    log::warn!(
                        "peer '{peer}' asks for the outcome of {vne}@{id}, and isn't listed"
                    );
                    return Ok(());
                }
                if let Some(decided_in) = store {
                    self.is_where_it_was_decided(&vne, &decided_in)?;
                }
                self.listed(&SnapshotRef { vne, id }, message.take, Some(peer))?
            }
            _ => None,
        };
        let order = unattended::as_coordinator(&message, committed.is_some());
        if let (Some(message), Some(remote)) = (order, self.remote(peer)) {
            let manifest = committed.filter(|_| message.order == cut::Order::Commit);
            remote.order(Order {
                message,
                plan: None,
                manifest: manifest.map(Box::new),
            });
        }
        Ok(())
    }

    /// Refuses to look for a snapshot in another store than that in which it
    /// would be, as its description or what is mounted may have changed.
    fn is_where_it_was_decided(&self, vne: &Name, decided_in: &StoreId) -> Result<(), Error> {
        let root = self.store(vne)?;
        let id = Store::open_existing(&root)?.id()?;
        if id == *decided_in {
            return Ok(());
        }
        Err(Error::Failed(format!(
            "the store of VNE '{vne}', {}, is another one than that of the take (it is {id}, not \
             {decided_in}): describe or mount that one again",
            root.display()
        )))
    }

    /// The manifest of a snapshot that a take has made, if it exists here, and
    /// `host` has a part of it.
    fn listed(
        &self,
        snapshot: &SnapshotRef,
        take: TakeId,
        host: Option<&Name>,
    ) -> Result<Option<Manifest>, Error> {
        // Whoever took part has made the store: one that isn't there isn't mounted,
        // and says nothing about what exists.
        let store = Store::open_existing(&self.store(&snapshot.vne)?)?;
        match store.catalogue().get(&snapshot.vne, &snapshot.id) {
            Ok(found) => {
                let manifest = found.manifest();
                let theirs = host.is_none_or(|host| manifest.hosts.contains(host));
                let same = manifest.take == take.to_string() && theirs;
                Ok(same.then(|| manifest.clone()))
            }
            Err(image::Error::NoSnapshot { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    // Orders.

    /// To this host's side of the take, if there is one; else it comes back.
    pub(super) fn pass_on_order(&self, peer: &Name, order: Order) -> Option<Order> {
        let take = order.message.take;
        if let Some(side) = lock(&self.takes.sides).get(&take) {
            if side.leader == *peer {
                side.link.order(order);
            }
            return None;
        }
        if let Some(doubt) = lock(&self.takes.doubts).get(&take) {
            if doubt.leader == *peer {
                let _ = doubt.to.send(order);
            }
            return None;
        }
        Some(order)
    }

    /// About a take that this host has no side of (yet).
    pub(super) fn order(self: &Arc<Self>, peer: &Name, order: Order) -> Result<(), Error> {
        let message = order.message;
        let snapshot = match (&order.plan, &order.manifest) {
            (Some(plan), _) => Some(SnapshotRef {
                vne: plan.vne.clone(),
                id: plan.id.clone(),
            }),
            (None, Some(manifest)) => Some(SnapshotRef {
                vne: manifest.vne.clone(),
                id: manifest.id.clone(),
            }),
            _ => None,
        };
        let committed = match snapshot {
            // Here a take begins, and its name is new.
            Some(_) if message.order == cut::Order::Prepare => false,
            Some(snapshot) if self.may(peer, &snapshot.vne) => {
                self.listed(&snapshot, message.take, None)?.is_some()
            }
            _ => false,
        };
        let say = |news: News| {
            if let Some(remote) = self.remote(peer) {
                remote.tell(news);
            }
        };
        if message.order == cut::Order::Prepare {
            if let Some(plan) = order.plan {
                // Fails before there is a session: said as an end of the take.
                if let Err(error) = self.start_side(peer, message.take, *plan) {
                    log::warn!("peer '{peer}': {}", sentence(&error));
                    say(News::Said {
                        message: cut::FromHost {
                            take: message.take,
                            session: None,
                            reply: Reply::Failed(sentence(&error)),
                        },
                        attached: Attached::Nothing,
                    });
                }
                return Ok(());
            }
        }
        if let Some(message) = unattended::as_host(&message, committed) {
            say(News::Said {
                message,
                attached: Attached::Nothing,
            });
        }
        Ok(())
    }

    fn start_side(self: &Arc<Self>, peer: &Name, take: TakeId, plan: Plan) -> Result<(), Error> {
        // Orders are repeated while this one is being carried out.
        if !lock(&self.takes.starting).insert(take) {
            return Ok(());
        }
        let daemon = Arc::clone(self);
        let _starting = Entered(move || {
            lock(&daemon.takes.starting).remove(&take);
        });
        let here = self.here();
        let described = self.vne(&plan.vne)?;
        let not_for = || Error::Failed(self.not_for(peer, &plan.vne));
        let described = described.ok_or_else(not_for)?;
        check(peer, &here, &plan, &described).map_err(Error::Failed)?;
        sweep(&self.program, &Register::open(&self.run_dir)?)?;
        let theirs = |sides: &HashMap<TakeId, Side>| {
            sides.values().filter(|side| side.leader == *peer).count()
        };
        if theirs(&lock(&self.takes.sides)) >= SIDES_MAX {
            return Err(Error::Failed(format!(
                "host '{here}' takes part in {SIDES_MAX} takes of '{peer}' already"
            )));
        }
        if lock(&self.takes.sides).contains_key(&take) {
            return Ok(());
        }
        self.not_stopping()?;
        let remote = self.remote(peer);
        let remote = remote.ok_or_else(|| Error::Failed(format!("'{peer}' is no peer")))?;
        let snapshot = SnapshotRef {
            vne: plan.vne.clone(),
            id: plan.id.clone(),
        };
        let say = move |news| remote.tell(news);
        let started = acting::start(self.place(described.store), plan, Which::new(take)?, say)?;
        lock(&self.takes.sides).insert(
            take,
            Side {
                leader: peer.clone(),
                snapshot,
                link: started.link,
                in_doubt: started.in_doubt,
            },
        );
        let daemon = Arc::clone(self);
        std::thread::spawn(move || {
            let _ = started.thread.join();
            lock(&daemon.takes.sides).remove(&take);
        });
        Ok(())
    }

    /// Nothing is begun that would have to be given up at once.
    pub(super) fn not_stopping(&self) -> Result<(), Error> {
        if self.takes.stopping.load(Ordering::Relaxed) {
            return Err(Error::Failed(format!(
                "vned on '{}' is being stopped",
                self.here()
            )));
        }
        Ok(())
    }

    // In doubt.

    /// Puts disks right of restores that a loss of power has ended.
    fn recover_disks(&self, root: &Path) {
        let recovered = Store::open(root).map_err(Error::from).and_then(|store| {
            let register = Register::open(&self.run_dir)?;
            restore::recover_disks(&store, &register)
        });
        if let Err(error) = recovered {
            log::error!("{}: {}", root.display(), sentence(&error));
        }
    }

    /// Goes on with the parts that a daemon before this one voted for, and
    /// deletes those that it didn't: after a loss of power nobody else does.
    pub(super) fn resume_in_doubt(self: &Arc<Self>, stores: &[PathBuf]) {
        for root in stores {
            self.recover_disks(root);
            let found = Store::open(root).and_then(|store| {
                let found = store.in_doubt()?;
                store.clean_tmp()?;
                Ok(found)
            });
            let found = match found {
                Ok(found) => found,
                Err(error) => {
                    log::error!("{}: {}", root.display(), sentence(&error));
                    continue;
                }
            };
            for (part, bytes) in found {
                match Vote::decode(&bytes) {
                    Ok(vote) => self.doubt(part, vote),
                    Err(error) => log::error!("{}: {}", part.dir().display(), sentence(&error)),
                }
            }
        }
    }

    fn doubt(self: &Arc<Self>, mut part: image::Take, vote: Vote) {
        let snapshot = SnapshotRef {
            vne: part.vne().clone(),
            id: part.id().clone(),
        };
        let host = &vote.leader;
        log::warn!("{snapshot}: asking host '{host}' whether it exists");
        let (to, orders) = mpsc::channel();
        let doubt = Doubt {
            leader: vote.leader.clone(),
            snapshot: snapshot.clone(),
            to,
        };
        lock(&self.takes.doubts).insert(vote.take, doubt);
        let daemon = Arc::clone(self);
        std::thread::spawn(move || {
            let outcome = loop {
                let Some(manifest) = daemon.ask_until_known(&vote, &snapshot, &orders) else {
                    break None;
                };
                let here = daemon.here();
                match vote::commit(&mut part, &here, &manifest, &vote.members) {
                    Ok(()) => break Some(()),
                    // A full disk may have room later.
                    Err(error) => log::error!("{snapshot}: {}", sentence(&error)),
                }
                std::thread::sleep(ASK);
            };
            match outcome {
                Some(()) => {
                    log::info!("{snapshot} exists");
                    daemon.answer(&vote, Reply::Committed);
                }
                None => match part.discard() {
                    Ok(()) => {
                        log::info!("{snapshot} doesn't exist");
                        daemon.answer(&vote, Reply::Aborted);
                    }
                    Err(error) => log::error!("{snapshot}: {}", sentence(&error)),
                },
            }
            lock(&daemon.takes.doubts).remove(&vote.take);
        });
    }

    /// The manifest, if the snapshot exists.
    fn ask_until_known(
        &self,
        vote: &Vote,
        snapshot: &SnapshotRef,
        orders: &mpsc::Receiver<Order>,
    ) -> Option<Manifest> {
        let ask_ns = u64::try_from(ASK.as_nanos()).unwrap_or(u64::MAX);
        let limits = HostLimits {
            ask_ns,
            ..LIMITS_MAX
        };
        let mut host = Host::in_doubt(vote.take, vote.session, limits, now_ns());
        let mut outcome = None;
        let mut input = HostInput::Tick;
        loop {
            for action in host.handle(now_ns(), input) {
                match action {
                    HostAction::Say(message) => self.say(vote, message, snapshot),
                    HostAction::Commit => return outcome,
                    HostAction::Undo => return None,
                    _ => {}
                }
            }
            input = match orders.recv_timeout(ASK) {
                Ok(order) => {
                    if let Some(manifest) = order.manifest {
                        outcome = Some(*manifest);
                    }
                    let commits = order.message.order == cut::Order::Commit;
                    if commits && outcome.is_none() {
                        // Of no use: it's asked for again.
                        HostInput::Tick
                    } else {
                        HostInput::Heard(order.message)
                    }
                }
                Err(_) => HostInput::Tick,
            };
        }
    }

    fn say(&self, vote: &Vote, message: cut::FromHost, snapshot: &SnapshotRef) {
        if let Some(remote) = self.remote(&vote.leader) {
            remote.tell(News::Said {
                message,
                attached: Attached::Part {
                    vne: snapshot.vne.clone(),
                    id: snapshot.id.clone(),
                    members: vote.members.clone(),
                    store: vote.store.clone(),
                },
            });
        }
    }

    fn answer(&self, vote: &Vote, reply: Reply) {
        if let Some(remote) = self.remote(&vote.leader) {
            remote.tell(News::Said {
                message: cut::FromHost {
                    take: vote.take,
                    session: Some(vote.session),
                    reply,
                },
                attached: Attached::Nothing,
            });
        }
    }

    // Snapshots.

    /// Deletes this host's part of a snapshot that a peer has one of as well.
    /// Whether there was one.
    pub(super) fn remove_for(&self, peer: &Name, snapshot: &SnapshotRef) -> Result<bool, Error> {
        let store = Store::open(&self.store(&snapshot.vne)?)?;
        match store.catalogue().get(&snapshot.vne, &snapshot.id) {
            // A copy is its own host's alone.
            Ok(found) if found.manifest().is_copy() => return Ok(false),
            Ok(found) if !found.manifest().hosts.contains(peer) => return Ok(false),
            Ok(_) | Err(image::Error::Damaged { .. }) => {}
            Err(image::Error::NoSnapshot { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        match store.catalogue().remove(&snapshot.vne, &snapshot.id) {
            Ok(()) => Ok(true),
            Err(image::Error::NoSnapshot { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

fn number() -> Result<u64, Error> {
    crate::random::number().map_err(Error::start("get a random number"))
}

/// A take that failed, and which of its hosts can't be reached, as that may be
/// why.
fn with_troubles(error: Error, remotes: &[Arc<Remote>]) -> Error {
    let trouble = |remote: &Arc<Remote>| {
        let why = remote.trouble()?;
        Some(format!("; {}: {why}", remote.peer.name))
    };
    let troubles: String = remotes.iter().filter_map(trouble).collect();
    if troubles.is_empty() {
        error
    } else {
        Error::Failed(sentence(&error) + &troubles)
    }
}

/// What a peer plans for this host is what this host's own description of the
/// VNE allows.
fn check(
    peer: &Name,
    here: &Name,
    plan: &Plan,
    described: &super::VneDescription,
) -> Result<(), String> {
    if plan.leader != *peer {
        return Err(format!("'{peer}' leads no takes for '{}'", plan.leader));
    }
    if plan.members.len() > MEMBERS_MAX {
        return Err(format!("more than {MEMBERS_MAX} members on one host"));
    }
    let mut names = HashSet::new();
    if let Some(name) = plan.members.iter().find(|name| !names.insert(*name)) {
        return Err(format!("it names '{name}' twice"));
    }
    let known = |name: &Name| {
        let members = described.members.iter();
        let mut ours = members.filter(|member| member.host == *here);
        ours.any(|member| member.name == *name)
    };
    if let Some(name) = plan.members.iter().find(|name| !known(name)) {
        return Err(format!(
            "'{name}' is no member of VNE '{}' on host '{here}' by the description there",
            plan.vne
        ));
    }
    let limits = &plan.limits;
    let sane = limits.hold_ns <= LIMITS_MAX.hold_ns
        && limits.lease_ns <= LIMITS_MAX.lease_ns
        && (1_000_000..=LIMITS_MAX.ask_ns).contains(&limits.ask_ns)
        && plan.hold_bytes <= HOLD_BYTES_MAX
        && plan.policy.is_sane();
    if sane {
        Ok(())
    } else {
        Err(String::from("it asks for limits that make no sense"))
    }
}
