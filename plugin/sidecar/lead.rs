//! Leading a take: runs the protocol's coordinator, tells the hosts what to do,
//! and puts together the manifest from what they say.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error::Error;
use super::manifest::{downtime, skew_ns};
use super::wire::{Attached, News, Order, PartMember, Plan};
use crate::clock::now_ns;
use crate::cut::{
    self, Action, Coordinator, HostLimits, Input, Limits, OnDivergence, Phase, Reply, TakeId,
};
use crate::domain::policy::{PolicyConfig, Round};
use crate::domain::DomainFacts;
use crate::image::{Cut, Manifest, Name, SnapshotId, StoreId, FORMAT};

/// How long hosts that haven't heard yet that the snapshot exists are waited
/// for. They learn it by themselves as soon as they can, in ns.
const CONFIRM_NS: u64 = 10_000_000_000;

/// Members of a take: its manifest has to fit into one message to each host.
const MEMBERS_MAX: usize = 2048;

/// One member of a VNE.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberName {
    /// The host that it's on.
    pub host: Name,
    /// The domain.
    pub name: Name,
}

/// What to take and how.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TakeRequest {
    /// The VNE.
    pub vne: Name,
    /// Its members.
    pub members: Vec<MemberName>,
    /// A word of the user's about this snapshot.
    pub label: Option<String>,
    /// The phases' deadlines.
    pub limits: Limits,
    /// The hosts' own.
    pub host_limits: HostLimits,
    /// What to do about members that don't converge.
    pub on_divergence: OnDivergence,
    /// When a member has converged.
    pub policy: PolicyConfig,
    /// Size of each vif's hold queue in bytes.
    pub hold_bytes: u32,
    /// Whether members may have disks that they write to: those aren't
    /// captured.
    pub memory_only: bool,
    /// Only find out whether it could be done.
    pub dry_run: bool,
}

impl TakeRequest {
    /// Refuses what makes no sense.
    pub fn check(&self) -> Result<(), Error> {
        if self.members.is_empty() {
            return Err(Error::NoMembers(self.vne.to_string()));
        }
        if self.members.len() > MEMBERS_MAX {
            return Err(Error::Failed(format!(
                "VNE '{}' has more than {MEMBERS_MAX} members",
                self.vne
            )));
        }
        for (at, member) in self.members.iter().enumerate() {
            let before = self.members.iter().take(at);
            if before.clone().any(|other| other.name == member.name) {
                return Err(Error::Twice(member.name.to_string()));
            }
        }
        Ok(())
    }
}

/// What there is to see of a take while it works. Members are numbered as in
/// the request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// Another phase begins.
    Phase(Phase),
    /// A member has sent a pre-copy round.
    Round {
        /// Which.
        member: usize,
        /// Its figures.
        round: Round,
        /// Whether what is left is within the policy's aim.
        converged: bool,
    },
    /// A member was cut and runs again.
    Cut {
        /// Which.
        member: usize,
        /// For how long it was down, in ns.
        downtime_ns: u64,
    },
    /// A member was slowed down, as it doesn't converge.
    Throttled {
        /// Which.
        member: usize,
        /// What it may use now, in percent of one physical CPU.
        cap: u32,
    },
    /// A member's part is stored.
    Stored {
        /// Which.
        member: usize,
    },
}

/// Whoever watches a take.
pub trait Progress {
    /// Takes in what there is to see.
    fn tell(&mut self, told: Told);
}

/// How a take ended well.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Taken {
    /// The snapshot exists.
    Snapshot {
        /// What it says about itself.
        manifest: Box<Manifest>,
        /// Hosts that haven't said yet that they list it. They ask for it until
        /// they know.
        unconfirmed: Vec<Name>,
    },
    /// Only the plan was asked for: the members, in the request's order.
    Planned(Vec<DomainFacts>),
}

/// How another host's monotonic clock stands to ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offset {
    /// Its clock minus ours, in ns.
    pub ahead_ns: i128,
    /// How wrong that may be, in ns.
    pub error_ns: u64,
}

impl Offset {
    /// The error of an offset of which nothing is known.
    pub const UNKNOWN_NS: u64 = 1 << 60;
}

/// The way to a host. Messages may be lost.
pub(super) trait Link {
    /// Sends an order, without waiting for anything.
    fn order(&self, order: Order);
    /// What is known of its clock.
    fn offset(&self) -> Offset;
}

/// What the leader hears.
#[derive(Debug)]
pub(super) enum Heard {
    /// A host said something.
    News(usize, Box<News>),
    /// Whether the decision is durable.
    Decided(Result<(), String>),
    /// The user wants no more of it.
    Interrupted,
}

/// A host of the take.
struct Party {
    name: Name,
    /// Its members' numbers in the request.
    members: Vec<usize>,
    facts: Option<Vec<DomainFacts>>,
    hold_ns: u64,
    part: Vec<PartMember>,
    xen_version: String,
}

/// What has to be known to lead a take.
pub(super) struct Lead<'a> {
    pub request: &'a TakeRequest,
    pub take: TakeId,
    pub id: SnapshotId,
    /// Where it's decided, if other hosts may have to ask.
    pub store: Option<StoreId>,
    /// The way to each host of [`hosts`], in that order.
    pub links: Vec<Box<dyn Link>>,
    /// Makes the decision durable on this host, and then lets itself be heard.
    pub decide: Box<dyn Fn(Manifest)>,
}

/// The hosts of a take that `here` leads: itself first, with or without
/// members.
pub(super) fn hosts(here: &Name, request: &TakeRequest) -> Vec<Name> {
    let mut hosts = vec![here.clone()];
    for member in &request.members {
        if !hosts.contains(&member.host) {
            hosts.push(member.host.clone());
        }
    }
    hosts
}

/// The names of a request's members on a host.
fn names(request: &TakeRequest, host: &Name) -> Vec<Name> {
    let ours = request.members.iter().filter(|member| member.host == *host);
    ours.map(|member| member.name.clone()).collect()
}

/// A host's part of a request.
pub(super) fn plan(
    request: &TakeRequest,
    id: &SnapshotId,
    store: Option<&StoreId>,
    leader: &Name,
    host: &Name,
) -> Plan {
    Plan {
        vne: request.vne.clone(),
        id: id.clone(),
        leader: leader.clone(),
        members: names(request, host),
        limits: request.host_limits,
        policy: request.policy,
        hold_bytes: request.hold_bytes,
        memory_only: request.memory_only,
        dry_run: request.dry_run,
        store: store.cloned(),
    }
}

/// Leads a take to its end.
pub(super) fn lead(
    lead: &Lead<'_>,
    here: &Name,
    heard: &Receiver<Heard>,
    progress: &mut dyn Progress,
) -> Result<Taken, Error> {
    let request = lead.request;
    let members_of = |host: &Name| {
        let numbered = request.members.iter().enumerate();
        let ours = numbered.filter(|(_, member)| member.host == *host);
        ours.map(|(number, _)| number).collect()
    };
    let parties: Vec<Party> = hosts(here, request)
        .into_iter()
        .map(|name| Party {
            members: members_of(&name),
            name,
            facts: None,
            hold_ns: 0,
            part: Vec::new(),
            xen_version: String::new(),
        })
        .collect();
    let names: Vec<String> = parties.iter().map(|party| party.name.to_string()).collect();
    let (limits, choice) = (request.limits, request.on_divergence);
    let (coordinator, first) = Coordinator::begin(lead.take, &names, limits, choice, now_ns());
    Leading {
        lead,
        parties,
        coordinator,
        todo: first.into(),
        manifest: None,
        planned: None,
        decided_ns: None,
        told: None,
        progress,
    }
    .run(heard)
}

struct Leading<'a> {
    lead: &'a Lead<'a>,
    parties: Vec<Party>,
    coordinator: Coordinator,
    todo: VecDeque<Action>,
    manifest: Option<Manifest>,
    /// The members as they were found; a dry run ends with that.
    planned: Option<Vec<DomainFacts>>,
    decided_ns: Option<u64>,
    /// The phase that was told last.
    told: Option<Phase>,
    progress: &'a mut dyn Progress,
}

impl Leading<'_> {
    fn run(mut self, heard: &Receiver<Heard>) -> Result<Taken, Error> {
        loop {
            while let Some(action) = self.todo.pop_front() {
                self.carry_out(action);
            }
            let phase = self.coordinator.phase();
            // Whoever watches may be slow, and nobody is to wait for that.
            if self.told != Some(phase) {
                self.told = Some(phase);
                self.progress.tell(Told::Phase(phase));
            }
            match phase {
                Phase::Done => return self.snapshot(),
                Phase::Failed => return self.failed(),
                _ if self.waited_enough() => return self.snapshot(),
                _ => {}
            }
            let deadline_ns = self.coordinator.deadline_ns();
            let wait_ns = deadline_ns.map_or(1_000_000_000, |at| at.saturating_sub(now_ns()));
            match heard.recv_timeout(Duration::from_nanos(wait_ns)) {
                Ok(Heard::News(host, news)) => self.hear(host, *news),
                Ok(Heard::Decided(Ok(()))) => {
                    self.decided_ns = Some(now_ns());
                    self.tell(Input::Decided);
                }
                Ok(Heard::Decided(Err(why))) => self.tell(Input::Failed(why)),
                Err(RecvTimeoutError::Timeout) => self.tell(Input::Tick),
                // Whoever asked for it has gone.
                Ok(Heard::Interrupted) | Err(RecvTimeoutError::Disconnected) => {
                    self.tell(Input::Interrupted);
                }
            }
        }
    }

    fn tell(&mut self, input: Input) {
        let actions = self.coordinator.handle(now_ns(), input);
        self.todo.extend(actions);
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Send(host, message) => {
                let plan = (message.order == cut::Order::Prepare).then(|| self.plan(host));
                let commits = message.order == cut::Order::Commit;
                let manifest = self.manifest.as_ref().filter(|_| commits);
                let order = Order {
                    message,
                    plan: plan.flatten().map(Box::new),
                    manifest: manifest.cloned().map(Box::new),
                };
                if let Some(link) = self.lead.links.get(host) {
                    link.order(order);
                }
            }
            Action::Decide => match self.assemble() {
                Ok(manifest) => {
                    (self.lead.decide)(manifest.clone());
                    self.manifest = Some(manifest);
                }
                Err(why) => self.tell(Input::Failed(why)),
            },
        }
    }

    fn plan(&self, host: usize) -> Option<Plan> {
        let host = &self.parties.get(host)?.name;
        let leader = &self.parties.first()?.name;
        let store = self.lead.store.as_ref();
        Some(plan(self.lead.request, &self.lead.id, store, leader, host))
    }

    fn hear(&mut self, host: usize, news: News) {
        let Some(party) = self.parties.get_mut(host) else {
            return;
        };
        let number = |member: usize| party.members.get(member).copied();
        match news {
            News::Said { message, attached } => {
                let session = message.session;
                let prepared = message.reply == Reply::Prepared;
                self.tell(Input::Heard(host, message));
                // What is late, of a session that is no more, isn't taken in.
                if session.is_some() && session == self.coordinator.session(host) {
                    self.take_in(host, attached);
                }
                if prepared {
                    self.plan_ready();
                }
            }
            News::Round {
                member,
                round,
                converged,
                ..
            } => {
                if let Some(member) = number(member) {
                    self.progress.tell(Told::Round {
                        member,
                        round,
                        converged,
                    });
                }
            }
            News::Cut { member, times, .. } => {
                if let Some(member) = number(member) {
                    self.progress.tell(Told::Cut {
                        member,
                        downtime_ns: downtime(&times).total_ns(),
                    });
                }
            }
            News::Throttled { member, cap, .. } => {
                if let Some(member) = number(member) {
                    self.progress.tell(Told::Throttled { member, cap });
                }
            }
            News::Stored { member, .. } => {
                if let Some(member) = number(member) {
                    self.progress.tell(Told::Stored { member });
                }
            }
        }
    }

    fn take_in(&mut self, host: usize, attached: Attached) {
        let Some(party) = self.parties.get_mut(host) else {
            return;
        };
        match attached {
            Attached::Nothing => {}
            Attached::Looked { facts, xen_version } => {
                party.facts = Some(facts);
                party.xen_version = xen_version;
            }
            Attached::Held { hold_ns } => party.hold_ns = hold_ns,
            Attached::Part { members, .. } => party.part = members,
        }
    }

    /// Keeps the plan once all hosts have looked; a dry run ends there.
    fn plan_ready(&mut self) {
        let looked = self.parties.iter().all(|party| party.facts.is_some());
        if self.planned.is_some() || !looked {
            return;
        }
        let mut planned: Vec<(usize, DomainFacts)> = Vec::new();
        for party in &self.parties {
            let facts = party.facts.iter().flatten().cloned();
            planned.extend(party.members.iter().copied().zip(facts));
        }
        planned.sort_by_key(|(number, _)| *number);
        let planned: Vec<_> = planned.into_iter().map(|(_, facts)| facts).collect();
        self.planned = Some(planned);
        if self.lead.request.dry_run {
            // Nobody was told to begin.
            self.todo.clear();
            self.tell(Input::Interrupted);
        }
    }

    /// What the hosts have said, as one manifest: that of this host.
    fn assemble(&self) -> Result<Manifest, String> {
        let request = self.lead.request;
        let first = self.parties.first().ok_or("a take without hosts")?;
        let mut members = Vec::new();
        let mut errors = Vec::new();
        for (party, link) in self.parties.iter().zip(&self.lead.links) {
            let entries = party.part.iter().map(|part| &part.entry);
            let as_planned = entries
                .clone()
                .map(|entry| &entry.name)
                .eq(&names(self.lead.request, &party.name))
                && entries.clone().all(|entry| entry.host == party.name);
            if !as_planned {
                return Err(format!("{}: stored other members than planned", party.name));
            }
            let offset = link.offset();
            if !party.members.is_empty() {
                errors.push(offset.error_ns);
            }
            for (number, part) in party.members.iter().zip(&party.part) {
                let cut_ns = i128::from(part.suspended_ns) - offset.ahead_ns;
                members.push((*number, part.entry.clone(), cut_ns));
            }
        }
        members.sort_by_key(|(number, _, _)| *number);
        let cuts: Vec<i128> = members.iter().map(|(_, _, cut_ns)| *cut_ns).collect();
        let first_ns = cuts.iter().min().copied().unwrap_or_default();
        let after = |cut_ns: &i128| u64::try_from(cut_ns - first_ns).unwrap_or(u64::MAX);
        // Two clocks can be wrong in opposite directions.
        errors.sort_unstable();
        let skew_error_ns = errors.iter().rev().take(2).sum();
        let versions = self.parties.iter().map(|party| &party.xen_version);
        let hold_ns = self.parties.iter().map(|party| party.hold_ns).max();
        Ok(Manifest {
            format: FORMAT,
            vne: request.vne.clone(),
            id: self.lead.id.clone(),
            take: self.lead.take.to_string(),
            created: self.lead.id.created(),
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            xen_version: versions
                .clone()
                .find(|v| !v.is_empty())
                .cloned()
                .unwrap_or_default(),
            host: first.name.clone(),
            hosts: self
                .parties
                .iter()
                .map(|party| party.name.clone())
                .collect(),
            label: request.label.clone(),
            cut: Cut {
                skew_ns: skew_ns(&cuts),
                skew_error_ns,
                at_ns: cuts.iter().map(after).collect(),
                hold_ns: hold_ns.unwrap_or_default(),
            },
            stored: Vec::new(),
            members: members.into_iter().map(|(_, entry, _)| entry).collect(),
        })
    }

    /// It exists, and a host doesn't say that it has heard so.
    fn waited_enough(&self) -> bool {
        self.decided_ns
            .is_some_and(|since| now_ns() >= since.saturating_add(CONFIRM_NS))
    }

    fn snapshot(self) -> Result<Taken, Error> {
        let missing = || Error::Failed(String::from("committed without a manifest"));
        let over = self.coordinator.phase() == Phase::Done;
        let unheard = |index: &usize| !over && !self.coordinator.answered(*index);
        let unconfirmed = (0..self.parties.len()).filter(unheard);
        Ok(Taken::Snapshot {
            unconfirmed: unconfirmed
                .filter_map(|index| self.parties.get(index))
                .map(|party| party.name.clone())
                .collect(),
            manifest: Box::new(self.manifest.ok_or_else(missing)?),
        })
    }

    fn failed(self) -> Result<Taken, Error> {
        match self.planned {
            Some(planned) if self.lead.request.dry_run => Ok(Taken::Planned(planned)),
            _ => {
                let why = self.coordinator.why().unwrap_or("aborted");
                Err(Error::Failed(why.to_owned()))
            }
        }
    }
}
