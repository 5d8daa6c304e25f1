//! What coordinator and hosts say to each other, without what goes along with
//! it (the plan of a take, the times of a cut): that is no matter of the
//! protocol.

use serde::{Deserialize, Serialize};

/// The version of the protocol.
pub const PROTOCOL: u32 = 1;

/// Names a take among all, for ever: made up at random by its coordinator.
/// Written as 16 hex digits, since not every reader of JSON has 64-bit numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TakeId(pub u64);

/// Names one time that a host prepared a take: made up at random by the host.
/// Written as a [`TakeId`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Session(pub u64);

macro_rules! written_in_hex {
    ($($name:ident),*) => {$(
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{:016x}", self.0)
            }
        }

        impl From<$name> for String {
            fn from(number: $name) -> Self {
                number.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = &'static str;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                let hex = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
                let number = u64::from_str_radix(&text, 16).ok().filter(|_| hex);
                number.map(Self).ok_or("16 hex digits are expected")
            }
        }
    )*};
}
written_in_hex!(TakeId, Session);

/// An order, in the order in which they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Lock the members, look at them, build the holds.
    Prepare,
    /// Begin to copy.
    Precopy,
    /// Slow down those members that haven't converged.
    Throttle,
    /// Copy once more what got dirty since, right before the cut.
    Approach,
    /// Hold the members' frames.
    Hold,
    /// Suspend, save and resume the members.
    Cut,
    /// Let the frames go.
    Release,
    /// Make the part durable.
    Finalise,
    /// The snapshot exists: make it visible.
    Commit,
    /// There will be no snapshot: undo everything.
    Abort,
}

/// What a host says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// All is built.
    Prepared,
    /// It's being done: the order came, and this host lives.
    Working,
    /// Whether all members here have converged.
    Converged(bool),
    /// Little is left to copy of the members here, or as little as there can be.
    Near,
    /// No frame leaves a member.
    Held,
    /// All members here were cut and run again.
    Cut,
    /// The frames were held until now, none was lost, and now they go.
    Released,
    /// The part is durable, and is kept until the outcome is known.
    Stored,
    /// The snapshot is visible here.
    Committed,
    /// Nothing is left here.
    Aborted,
    /// Something is wrong here, and is being undone.
    Failed(String),
}

/// From the coordinator to a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToHost {
    /// The take.
    pub take: TakeId,
    /// The host's session of it, once the coordinator knows that.
    pub session: Option<Session>,
    /// What to do.
    pub order: Order,
}

/// From a host to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FromHost {
    /// The take.
    pub take: TakeId,
    /// The host's session of it; none if it knows nothing of the take.
    pub session: Option<Session>,
    /// What there is to say.
    pub reply: Reply,
}
