//! Takes a snapshot with both sides of the protocol in this process: for a VNE
//! all of whose members are here, no daemon is needed.

use std::process::Stdio;
use std::sync::mpsc;
use std::time::SystemTime;

use super::acting::{self, Which};
use super::error::Error;
use super::journal::Register;
use super::lead::{self, lead, plan, Lead, Progress, TakeRequest, Taken};
use super::part::Place;
use super::signals;
use super::workers::Program;
use crate::cut::TakeId;
use crate::image::Store;

/// Takes a snapshot, or finds out whether it could.
pub fn take(
    request: &TakeRequest,
    place: &Place,
    progress: &mut dyn Progress,
) -> Result<Taken, Error> {
    request.check()?;
    sweep(&place.program, &Register::open(&place.run_dir)?)?;
    let id = Store::open(&place.store)?.free_id(&request.vne, SystemTime::now())?;
    let (said, heard) = mpsc::channel();
    let interrupted = said.clone();
    signals::watch(move || interrupted.send(lead::Heard::Interrupted).is_ok())?;
    let number = crate::random::number();
    let take = TakeId(number.map_err(Error::start("get a random number"))?);
    let here = &place.host;
    let plan = plan(request, &id, None, here, here);
    let to = said.clone();
    let say = move |news| drop(to.send(lead::Heard::News(0, Box::new(news))));
    let side = acting::start(place.clone(), plan, Which::new(take)?, say)?;
    let result = lead(
        &Lead {
            request,
            take,
            id,
            store: None,
            links: vec![Box::new(side.link.clone())],
            decide: side.link.decider(said),
        },
        here,
        &heard,
        progress,
    );
    drop(side.link);
    // All is undone when it has ended.
    let _ = side.thread.join();
    result
}

/// Cleans up after takes that were killed together with their guards.
pub fn sweep(program: &Program, register: &Register) -> Result<(), Error> {
    if register.is_empty()? {
        return Ok(());
    }
    let run = program
        .command(&["sweep"])
        .stderr(Stdio::inherit())
        .status();
    match run {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Error::Failed(format!(
            "cleaning up after a killed take or restore: {status}"
        ))),
        Err(source) => Err(Error::start("start the clean-up")(source)),
    }
}
