//! What goes wrong in one run, drawn from a seed.

use fastrand::Rng;

/// Milliseconds in ns.
pub const MS: u64 = 1_000_000;

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// vned is killed; its guard cleans up, and it starts again.
    Kill {
        /// How long until it does, in ns.
        restart_ns: u64,
    },
    /// The host loses power, and with it its members.
    PowerOff {
        /// How long until it's back, in ns.
        restart_ns: u64,
    },
    /// Nothing that the host sends arrives.
    Mute {
        /// For how long, in ns.
        for_ns: u64,
    },
    /// Nothing arrives at the host.
    Deaf {
        /// For how long, in ns.
        for_ns: u64,
    },
    /// All that arrived at the host so far arrives once more.
    Replay {
        /// Time between two messages, in ns.
        gap_ns: u64,
    },
    /// The user gives up what the host leads.
    Interrupt,
}

/// When and where a fault comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// Time in ns.
    pub at_ns: u64,
    /// The host.
    pub host: usize,
    /// What.
    pub fault: Fault,
}

/// A take that somebody asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlannedTake {
    /// When, in ns.
    pub at_ns: u64,
    /// The host on which it's asked for.
    pub host: usize,
}

/// All that one run depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// For everything that isn't written here.
    pub seed: u64,
    /// Hosts.
    pub hosts: usize,
    /// Members on each.
    pub members: usize,
    /// The last host has none: it only leads, or keeps the manifest.
    pub idle: bool,
    /// Takes of all members, from possibly different hosts.
    pub takes: Vec<PlannedTake>,
    /// Messages lost, in a thousand.
    pub lost: u64,
    /// Messages that come twice, in a thousand.
    pub repeated: u64,
    /// Messages that come late, in a thousand.
    pub late: u64,
    /// How late at most, in ns.
    pub late_ns: u64,
    /// Steps of a host's own that fail, in a thousand: a full disk, a guest
    /// that doesn't suspend, a queue that overflows.
    pub failing: u64,
    /// Clocks' drift, in a thousand.
    pub drift: u64,
    /// Faults.
    pub faults: Vec<Planned>,
}

impl Schedule {
    /// The schedule of a seed. A good part of all is harmless enough for takes
    /// to succeed.
    pub fn draw(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let hosts = rng.usize(1..=4);
        let pick = |rng: &mut Rng, from: &[u64]| from[rng.usize(..from.len())];
        let span = 2_500 * MS;
        let takes = (0..rng.usize(1..=2))
            .map(|number| PlannedTake {
                at_ns: if number == 0 { 0 } else { rng.u64(..span) },
                host: rng.usize(..hosts),
            })
            .collect();
        let count = pick(&mut rng, &[0, 1, 1, 2, 3, 6]);
        let faults = (0..count)
            .map(|_| Planned {
                at_ns: rng.u64(..span),
                host: rng.usize(..hosts),
                fault: Self::fault(&mut rng),
            })
            .collect();
        Self {
            seed,
            hosts,
            members: rng.usize(1..=3),
            idle: hosts > 1 && rng.u8(..4) == 0,
            takes,
            lost: pick(&mut rng, &[0, 0, 0, 20, 100, 300]),
            repeated: pick(&mut rng, &[0, 0, 20, 200]),
            late: pick(&mut rng, &[0, 0, 50, 300]),
            late_ns: pick(&mut rng, &[20 * MS, 200 * MS, 3_000 * MS]),
            failing: pick(&mut rng, &[0, 0, 0, 20, 100]),
            drift: pick(&mut rng, &[0, 1, 50]),
            faults,
        }
    }

    fn fault(rng: &mut Rng) -> Fault {
        let restart_ns = rng.u64(50 * MS..4_000 * MS);
        let for_ns = rng.u64(50 * MS..4_000 * MS);
        match rng.u8(..12) {
            0..=3 => Fault::Kill { restart_ns },
            4 => Fault::PowerOff { restart_ns },
            5..=6 => Fault::Mute { for_ns },
            7..=8 => Fault::Deaf { for_ns },
            9..=10 => Fault::Replay {
                gap_ns: rng.u64(MS..200 * MS),
            },
            _ => Fault::Interrupt,
        }
    }

    /// Schedules that differ by being simpler in one way.
    pub fn simpler(&self) -> Vec<Self> {
        let mut all = Vec::new();
        let mut with = |change: &dyn Fn(&mut Self)| {
            let mut other = self.clone();
            change(&mut other);
            if other != *self {
                all.push(other);
            }
        };
        for at in 0..self.faults.len() {
            with(&|s| {
                s.faults.remove(at);
            });
        }
        if self.takes.len() > 1 {
            for at in 0..self.takes.len() {
                with(&|s| {
                    s.takes.remove(at);
                });
            }
        }
        with(&|s| s.failing = 0);
        with(&|s| s.lost = 0);
        with(&|s| s.repeated = 0);
        with(&|s| s.late = 0);
        with(&|s| s.drift = 0);
        with(&|s| s.members = 1);
        with(&|s| s.idle = false);
        if self.hosts > 1 {
            with(&|s| {
                s.hosts -= 1;
                s.idle &= s.hosts > 1;
                s.faults.retain(|fault| fault.host < s.hosts);
                s.takes.iter_mut().for_each(|take| take.host %= s.hosts);
            });
        }
        all
    }
}
