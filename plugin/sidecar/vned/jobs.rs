//! What commands have the daemon do: takes and restores that it leads, each in
//! a thread, and each watched by the command.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::super::lead::{Progress, Told};
use super::super::restore;
use super::super::rpc::{CopyProgress, JobDone, JobId, JobTold, Watched};
use super::lock;
use crate::cut::Phase;

/// What isn't asked for for so long is watched by nobody any more.
const UNWATCHED_MAX: Duration = Duration::from_secs(10);
/// What a job may have told that nobody has heard; then rounds are left out.
const UNHEARD_MAX: usize = 4096;
/// How long one call waits for news.
const WATCH_MAX: Duration = Duration::from_millis(500);

/// One job.
pub(super) struct Job {
    told: Mutex<Vec<JobTold>>,
    done: Mutex<Option<JobDone>>,
    news: Notify,
    watched: Mutex<Instant>,
    interrupt: Box<dyn Fn() + Send + Sync>,
}

impl Job {
    /// Told by the work itself.
    pub fn tell(&self, told: JobTold) {
        let mut all = lock(&self.told);
        let told_phase = match &told {
            JobTold::Take(Told::Phase(phase)) => Some(*phase),
            _ => None,
        };
        let only_a_round = matches!(told, JobTold::Take(Told::Round { .. }));
        if !(only_a_round && all.len() >= UNHEARD_MAX) {
            all.push(told);
        }
        drop(all);
        // While frames are held, waking up a command costs those who wait.
        let in_the_cut = matches!(told_phase, Some(Phase::Hold | Phase::Drain | Phase::Cut));
        if !in_the_cut {
            self.news.notify_one();
        }
    }

    fn finish(&self, done: JobDone) {
        *lock(&self.done) = Some(done);
        self.news.notify_one();
    }

    fn is_done(&self) -> bool {
        lock(&self.done).is_some()
    }

    fn is_unwatched(&self) -> bool {
        lock(&self.watched).elapsed() > UNWATCHED_MAX
    }

    /// Wants no more of it.
    pub fn interrupt(&self) {
        (self.interrupt)();
    }

    /// What was told since the last time.
    pub async fn watch(&self) -> Watched {
        *lock(&self.watched) = Instant::now();
        // A result is the last thing to be told.
        let nothing_yet = lock(&self.told).is_empty() && !self.is_done();
        if nothing_yet {
            let _ = tokio::time::timeout(WATCH_MAX, self.news.notified()).await;
        }
        let done = lock(&self.done).clone();
        let told = std::mem::take(&mut *lock(&self.told));
        Watched { told, done }
    }
}

/// For takes.
impl Progress for Arc<Job> {
    fn tell(&mut self, told: Told) {
        Job::tell(self, JobTold::Take(told));
    }
}

/// For restores.
impl restore::Progress for Arc<Job> {
    fn copying(&mut self, how_far: CopyProgress) {
        Job::tell(self, JobTold::Copying(how_far));
    }

    fn building(&mut self, members: &[&str]) {
        let members = members.iter().map(|member| (*member).to_owned());
        Job::tell(self, JobTold::Building(members.collect()));
    }

    fn built(&mut self, member: &str) {
        Job::tell(self, JobTold::Built(member.to_owned()));
    }

    fn released(&mut self, played: u64) {
        Job::tell(self, JobTold::Released { played });
    }
}

/// All jobs that were asked for lately.
#[derive(Default)]
pub(super) struct Jobs {
    all: Mutex<(u64, HashMap<JobId, Arc<Job>>)>,
}

impl Jobs {
    /// Starts a job in a thread of its own; `interrupt` ends it early.
    pub fn start(
        &self,
        interrupt: impl Fn() + Send + Sync + 'static,
        work: impl FnOnce(&Arc<Job>) -> JobDone + Send + 'static,
    ) -> std::io::Result<JobId> {
        let job = Arc::new(Job {
            told: Mutex::default(),
            done: Mutex::default(),
            news: Notify::new(),
            watched: Mutex::new(Instant::now()),
            interrupt: Box::new(interrupt),
        });
        let id = {
            let mut all = lock(&self.all);
            all.1
                .retain(|_, job| !(job.is_done() && job.is_unwatched()));
            all.0 += 1;
            let id = JobId(all.0);
            all.1.insert(id, Arc::clone(&job));
            id
        };
        let name = String::from("job");
        std::thread::Builder::new().name(name).spawn(move || {
            let done = work(&job);
            job.finish(done);
        })?;
        Ok(id)
    }

    /// One of them.
    pub fn get(&self, id: JobId) -> Option<Arc<Job>> {
        lock(&self.all).1.get(&id).cloned()
    }

    /// Gives up those that nobody watches.
    pub fn interrupt_unwatched(&self) {
        self.interrupt_where(Job::is_unwatched);
    }

    /// Gives up all.
    pub fn interrupt_all(&self) {
        self.interrupt_where(|_| true);
    }

    fn interrupt_where(&self, which: impl Fn(&Job) -> bool) {
        let jobs: Vec<Arc<Job>> = lock(&self.all).1.values().cloned().collect();
        for job in jobs.iter().filter(|job| !job.is_done() && which(job)) {
            job.interrupt();
        }
    }
}
