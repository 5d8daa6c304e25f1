//! What is said of takes that nobody works on here: they are over, or belong
//! to a process that is no more.

use super::{FromHost, Order, Reply, ToHost};

/// A host's answer to an order about a take that it has no part of.
/// `committed` says whether its snapshot is visible here. [`Order::Prepare`]
/// isn't for here: it begins a part.
pub fn as_host(message: &ToHost, committed: bool) -> Option<FromHost> {
    let reply = match message.order {
        Order::Commit if committed => Reply::Committed,
        _ if committed => return None,
        Order::Abort => Reply::Aborted,
        _ => Reply::Failed(String::from("the take isn't known (any more)")),
    };
    Some(FromHost {
        take: message.take,
        session: if committed { message.session } else { None },
        reply,
    })
}

/// A coordinator's answer to a host that speaks of a take that nobody leads.
/// `committed` says whether the decision to commit it is on disk here. Who can't
/// look must not answer.
pub fn as_coordinator(message: &FromHost, committed: bool) -> Option<ToHost> {
    let order = match message.reply {
        Reply::Stored if committed => Order::Commit,
        Reply::Aborted | Reply::Committed | Reply::Failed(_) => return None,
        // Of a committed take, anything else is late.
        _ if committed => return None,
        // Presumed abort: what isn't known to be committed never will be.
        _ => Order::Abort,
    };
    Some(ToHost {
        take: message.take,
        session: message.session,
        order,
    })
}
