//! A command's way to the daemon on its host.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jsonrpsee::core::client::{Client, Error as RpcError};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::error::Error;
use super::lead::{Progress, TakeRequest, Taken};
use super::restore;
use super::rpc::SnapshotRef;
use super::rpc::{
    self, explain, AdminClient, CopyDone, CopyProgress, DaemonStatus, JobDone, JobId, JobTold,
    PeerTest, RestoreOrder,
};
use super::vned::SOCKET;
use crate::image::Name;

/// Removing may wait for other hosts.
const CALL_MAX: Duration = Duration::from_secs(60);

/// A connection to the daemon.
pub struct Daemon {
    runtime: Runtime,
    client: Client,
}

impl Daemon {
    /// Connects to it; `None` if none is running.
    pub fn find(run_dir: &Path) -> Result<Option<Self>, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::start("start the runtime"))?;
        let path = run_dir.join(SOCKET);
        let client = runtime.block_on(async {
            let stream = UnixStream::connect(&path).await?;
            Ok(rpc::client(stream, CALL_MAX))
        });
        match client {
            Ok(client) => Ok(Some(Self { runtime, client })),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(Error::Failed(format!("{}: {error}", path.display()))),
        }
    }

    /// Connects to it, for what can't be done without.
    pub fn connect(run_dir: &Path, what: &str) -> Result<Self, Error> {
        Self::find(run_dir)?.ok_or_else(|| {
            Error::Failed(format!(
                "{what}, and vned isn't running on this one: systemctl start vned"
            ))
        })
    }

    fn call<T>(
        &self,
        call: impl std::future::Future<Output = Result<T, RpcError>>,
    ) -> Result<T, Error> {
        let answer = self.runtime.block_on(call);
        answer.map_err(|error| {
            Error::Failed(match error {
                RpcError::RestartNeeded(_) => String::from(
                    "vned on this host has ended; what it was doing is undone, or goes on when it \
                     runs again (see 'xl vne-snapshot status')",
                ),
                error => explain(&error),
            })
        })
    }

    /// Has it take a snapshot.
    pub fn take(&self, request: &TakeRequest, progress: &mut dyn Progress) -> Result<Taken, Error> {
        let job = self.call(self.client.take(request.clone()))?;
        let done = self.watch(job, |told| {
            if let JobTold::Take(told) = told {
                progress.tell(told);
            }
        })?;
        match done {
            JobDone::Take(taken) => Ok(taken),
            done => Err(failed(done)),
        }
    }

    /// Has it restore a snapshot, or a copy of it under another name.
    pub fn restore(
        &self,
        order: RestoreOrder,
        progress: &mut dyn restore::Progress,
    ) -> Result<(), Error> {
        let job = self.call(self.client.restore(order))?;
        let done = self.watch(job, |told| match told {
            JobTold::Building(members) => {
                let members: Vec<&str> = members.iter().map(String::as_str).collect();
                progress.building(&members);
            }
            JobTold::Built(member) => progress.built(&member),
            JobTold::Released { played } => progress.released(played),
            JobTold::Warning(what) => log::warn!("{what}"),
            JobTold::Copying(how_far) => progress.copying(how_far),
            JobTold::Take(_) => {}
        })?;
        match done {
            JobDone::Restore => Ok(()),
            done => Err(failed(done)),
        }
    }

    /// Has it copy what a store has of a snapshot to another host.
    pub fn copy(
        &self,
        snapshot: SnapshotRef,
        store: PathBuf,
        host: Name,
        progress: &mut dyn FnMut(CopyProgress),
    ) -> Result<CopyDone, Error> {
        let job = self.call(self.client.copy(snapshot, store, host))?;
        let done = self.watch(job, |told| {
            if let JobTold::Copying(how_far) = told {
                progress(how_far);
            }
        })?;
        match done {
            JobDone::Copied(done) => Ok(done),
            done => Err(failed(done)),
        }
    }

    /// Follows a job to its end; a signal gives it up, and then its end is
    /// waited for.
    fn watch(&self, job: JobId, mut tell: impl FnMut(JobTold)) -> Result<JobDone, Error> {
        self.call(async {
            use tokio::signal::unix::{signal, SignalKind};
            let asks = |kind| signal(kind).map_err(|e| RpcError::Custom(e.to_string()));
            let mut int = asks(SignalKind::interrupt())?;
            let mut term = asks(SignalKind::terminate())?;
            let mut hangup = asks(SignalKind::hangup())?;
            loop {
                let watching = self.client.watch(job);
                tokio::pin!(watching);
                let watched = loop {
                    tokio::select! {
                        watched = &mut watching => break watched?,
                        _ = int.recv() => self.client.interrupt(job).await?,
                        _ = term.recv() => self.client.interrupt(job).await?,
                        _ = hangup.recv() => self.client.interrupt(job).await?,
                    }
                };
                for told in watched.told {
                    tell(told);
                }
                if let Some(done) = watched.done {
                    return Ok(done);
                }
            }
        })
    }

    /// Has other hosts delete their parts of a snapshot.
    pub fn remove(&self, snapshot: SnapshotRef, hosts: Vec<Name>) -> Result<(), Error> {
        self.call(self.client.remove(snapshot, hosts))
    }

    /// How it is.
    pub fn status(&self) -> Result<DaemonStatus, Error> {
        self.call(self.client.status())
    }

    /// Has it read its configuration again.
    pub fn reload(&self) -> Result<(), Error> {
        self.call(self.client.reload())
    }

    /// Has it try its peers.
    pub fn test_peers(&self, name: Option<&Name>) -> Result<Vec<PeerTest>, Error> {
        self.call(self.client.test_peers(name.cloned()))
    }
}

/// What ended otherwise than it was asked to.
fn failed(done: JobDone) -> Error {
    match done {
        JobDone::Failed(why) => Error::Failed(why),
        _ => Error::Failed(String::from("vned did something else")),
    }
}

/// Nobody has ever listened there, or nobody does any more.
fn is_absent(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), NotFound | ConnectionRefused)
}
