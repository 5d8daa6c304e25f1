//! What root on this host may ask.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use jsonrpsee::core::{async_trait, RpcResult};
use tokio::net::UnixListener;

use super::super::error::Error;
use super::super::lead::TakeRequest;
use super::super::peers::Remote;
use super::super::rpc::{
    refusal, serve as serve_connection, AdminServer, DaemonStatus, JobId, PeerClient, PeerTest,
    RestoreOrder, SnapshotRef, Watched,
};
use super::{lock, Daemon};
use crate::image::Name;
use crate::sentence::sentence;

/// A command's connection. The jobs that it has started end with it.
struct Admin {
    daemon: Arc<Daemon>,
    jobs: Arc<Jobs>,
}

struct Jobs {
    daemon: Arc<Daemon>,
    started: Mutex<Vec<JobId>>,
}

impl Drop for Jobs {
    fn drop(&mut self) {
        for job in lock(&self.started).iter() {
            if let Some(job) = self.daemon.jobs.get(*job) {
                job.interrupt();
            }
        }
    }
}

/// Answers commands.
pub(super) async fn serve(daemon: Arc<Daemon>, socket: UnixListener) {
    loop {
        let stream = match socket.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::warn!("the commands' socket: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let me = rustix::process::geteuid().as_raw();
        match stream.peer_cred() {
            Ok(who) if who.uid() == 0 || who.uid() == me => {}
            _ => {
                log::warn!("refused a command of somebody who isn't root");
                continue;
            }
        }
        let admin = Admin {
            daemon: Arc::clone(&daemon),
            jobs: Arc::new(Jobs {
                daemon: Arc::clone(&daemon),
                started: Mutex::default(),
            }),
        };
        tokio::spawn(async move {
            if let Err(error) = serve_connection(stream, admin.into_rpc().into()).await {
                log::info!("a command's connection: {error}");
            }
        });
    }
}

fn refused(error: &Error) -> jsonrpsee::types::ErrorObjectOwned {
    refusal(sentence(error))
}

#[async_trait]
impl AdminServer for Admin {
    async fn take(&self, request: TakeRequest) -> RpcResult<JobId> {
        let job = self.daemon.start_take(request).map_err(|e| refused(&e))?;
        lock(&self.jobs.started).push(job);
        Ok(job)
    }

    async fn restore(&self, order: RestoreOrder) -> RpcResult<JobId> {
        let job = self.daemon.start_restore(order).map_err(|e| refused(&e))?;
        lock(&self.jobs.started).push(job);
        Ok(job)
    }

    async fn watch(&self, job: JobId) -> RpcResult<Watched> {
        match self.daemon.jobs.get(job) {
            Some(job) => Ok(job.watch().await),
            None => Err(refusal("there is no such job")),
        }
    }

    async fn interrupt(&self, job: JobId) -> RpcResult<()> {
        if let Some(job) = self.daemon.jobs.get(job) {
            job.interrupt();
        }
        Ok(())
    }

    async fn remove(&self, snapshot: SnapshotRef, hosts: Vec<Name>) -> RpcResult<()> {
        let mut remotes = Vec::new();
        for host in &hosts {
            let remote = self.daemon.peer_for(host, &snapshot.vne);
            remotes.push(remote.map_err(|e| refused(&e))?);
        }
        // All or none, as far as can be known beforehand.
        for remote in &remotes {
            if let Err(why) = remote.look_at_clock().await {
                let name = &remote.peer.name;
                return Err(refusal(format!(
                    "host '{name}' has a part of {snapshot} and can't be reached: {why}; nothing \
                     was removed"
                )));
            }
        }
        let calls: Vec<_> = remotes
            .into_iter()
            .map(|remote| {
                let asked = snapshot.clone();
                tokio::spawn(async move {
                    let removed = remote.call(|client| async move { client.remove(asked).await });
                    let name = &remote.peer.name;
                    removed.await.map_err(|why| format!("{name}: {why}"))
                })
            })
            .collect();
        let mut result = Ok(());
        for call in calls {
            match call.await {
                Ok(Ok(_)) => {}
                Ok(Err(why)) => result = Err(refusal(why)),
                Err(error) => result = Err(refusal(error.to_string())),
            }
        }
        result
    }

    async fn copy(&self, snapshot: SnapshotRef, store: PathBuf, host: Name) -> RpcResult<JobId> {
        let job = self.daemon.start_copy(snapshot, store, host);
        let job = job.map_err(|e| refused(&e))?;
        lock(&self.jobs.started).push(job);
        Ok(job)
    }

    async fn status(&self) -> RpcResult<DaemonStatus> {
        Ok(self.daemon.status())
    }

    async fn reload(&self) -> RpcResult<()> {
        let daemon = Arc::clone(&self.daemon);
        match tokio::task::spawn_blocking(move || daemon.reload()).await {
            Ok(result) => result.map_err(|e| refused(&e)),
            Err(error) => Err(refusal(error.to_string())),
        }
    }

    async fn test_peers(&self, name: Option<Name>) -> RpcResult<Vec<PeerTest>> {
        let remotes: Vec<Arc<Remote>> = self.daemon.setup(|setup| {
            let all = setup.remotes.values();
            let chosen = all.filter(|r| name.as_ref().is_none_or(|name| r.peer.name == *name));
            chosen.cloned().collect()
        });
        let tests: Vec<_> = remotes
            .iter()
            .map(|remote| tokio::spawn(test(Arc::clone(remote), self.daemon.here())))
            .collect();
        let mut results = Vec::new();
        for test in tests {
            results.extend(test.await);
        }
        results.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(results)
    }
}

async fn test(remote: Arc<Remote>, here: Name) -> PeerTest {
    let hello = super::super::rpc::Hello::of(here);
    let greeted = remote
        .call(|client| async move { client.hello(hello).await })
        .await;
    let round_trip = remote.look_at_clock().await.unwrap_or_default();
    PeerTest {
        name: remote.peer.name.clone(),
        address: remote.peer.address.clone(),
        error: greeted.as_ref().err().cloned(),
        version: greeted.ok().map(|hello| hello.version),
        round_trip_ns: u64::try_from(round_trip.as_nanos()).unwrap_or(u64::MAX),
    }
}
