//! What peers may ask. Every call says which VNE it's about, or is about
//! something that did; and is looked at by who asks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use jsonrpsee::core::{async_trait, RpcResult};
use jsonrpsee::Methods;

use super::super::fit::Needs;
use super::super::rpc::{
    refusal, CopyState, Fit, Hello, JobId, PeerServer, RestoreOutcome, RestoreState, SnapshotRef,
    Ticket, Watched,
};
use super::super::tls::Fingerprint;
use super::super::wire::{News, Order};
use super::receiving::{Receiving, Step};
use super::restores::Building;
use super::{lock, Daemon};
use crate::clock::now_ns;
use crate::image::{Manifest, Name};
use crate::sentence::sentence;

/// One peer's connection.
pub(super) struct Service {
    daemon: Arc<Daemon>,
    peer: Name,
    fingerprint: Fingerprint,
    /// It has said which versions it speaks.
    greeted: AtomicBool,
    /// The copies that it has asked for.
    sending: Mutex<Vec<JobId>>,
    /// What it sends a copy of.
    receiving: Mutex<Option<Arc<Receiving>>>,
}

impl Service {
    /// What a peer may call.
    pub fn methods(daemon: &Arc<Daemon>, peer: &Name, fingerprint: Fingerprint) -> Methods {
        let service = Self {
            daemon: Arc::clone(daemon),
            peer: peer.clone(),
            fingerprint,
            greeted: AtomicBool::new(false),
            sending: Mutex::default(),
            receiving: Mutex::new(None),
        };
        service.into_rpc().into()
    }

    /// Refuses a peer that was removed a moment ago, or hasn't said who it is.
    fn still_a_peer(&self) -> RpcResult<()> {
        if !self.greeted.load(Ordering::Relaxed) {
            return Err(refusal("the first call of a connection is peer_hello"));
        }
        let still = self.daemon.setup(|setup| {
            let peer = setup.conf.peer_by(&self.fingerprint);
            peer.is_some_and(|peer| peer.name == self.peer)
        });
        if still {
            Ok(())
        } else {
            Err(refusal("you are no peer any more"))
        }
    }

    /// Refuses what is about a VNE that the peer isn't listed for.
    fn may(&self, vne: &Name) -> RpcResult<()> {
        self.still_a_peer()?;
        if self.daemon.may(&self.peer, vne) {
            Ok(())
        } else {
            log::warn!(
                "peer '{}' asked about VNE '{vne}', for which it isn't listed",
                self.peer
            );
            Err(refusal(self.daemon.not_for(&self.peer, vne)))
        }
    }

    /// The copy that this connection has begun, if the peer still may send one.
    fn receiving(&self) -> RpcResult<Arc<Receiving>> {
        let receiving = lock(&self.receiving).clone();
        let receiving = receiving.ok_or_else(|| refusal("no copy was begun"))?;
        self.may(&receiving.vne)?;
        Ok(receiving)
    }

    async fn copy_step(&self, step: Step) -> RpcResult<String> {
        self.receiving()?.step(step).await.map_err(refusal)
    }

    fn copy_begins(&self, step: Step) -> RpcResult<()> {
        let begun = self.receiving()?.begin(step);
        begun.map(drop).map_err(refusal)
    }

    /// Does what takes a moment where that holds up nobody.
    async fn apart<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Daemon>, &Name) -> Result<T, super::Error> + Send + 'static,
    ) -> RpcResult<T> {
        let (daemon, peer) = (Arc::clone(&self.daemon), self.peer.clone());
        let done = tokio::task::spawn_blocking(move || work(&daemon, &peer));
        match done.await {
            Ok(result) => result.map_err(|error| refusal(sentence(&error))),
            Err(error) => Err(refusal(error.to_string())),
        }
    }
}

impl Daemon {
    /// The same words whether there is such a VNE or not.
    pub(super) fn not_for(&self, peer: &Name, vne: &Name) -> String {
        format!(
            "host '{}' doesn't act for '{peer}' in a VNE '{vne}' (there: xl vne-snapshot peer add, \
             and a description of the VNE)",
            self.here()
        )
    }
}

#[async_trait]
impl PeerServer for Service {
    async fn hello(&self, hello: Hello) -> RpcResult<Hello> {
        let here = Hello::of(self.daemon.here());
        hello.check(&self.peer).map_err(|why| {
            log::warn!("peer '{}': {why}", self.peer);
            refusal(why)
        })?;
        self.greeted.store(true, Ordering::Relaxed);
        self.still_a_peer()?;
        Ok(here)
    }

    async fn clock(&self) -> RpcResult<u64> {
        self.still_a_peer()?;
        Ok(now_ns())
    }

    async fn order(&self, order: Order) -> RpcResult<()> {
        match &order.plan {
            Some(plan) => self.may(&plan.vne)?,
            None => self.still_a_peer()?,
        }
        // The way of the cut itself: no thread is started for it.
        let Some(order) = self.daemon.pass_on_order(&self.peer, order) else {
            return Ok(());
        };
        self.apart(move |daemon, peer| daemon.order(peer, order))
            .await
    }

    async fn news(&self, news: News) -> RpcResult<()> {
        self.still_a_peer()?;
        let Some(news) = self.daemon.pass_on_news(&self.peer, news) else {
            return Ok(());
        };
        self.apart(move |daemon, peer| daemon.news(peer, news))
            .await
    }

    async fn build(
        &self,
        ticket: Ticket,
        snapshot: SnapshotRef,
        paused: Option<bool>,
    ) -> RpcResult<()> {
        self.may(&snapshot.vne)?;
        let what = Building {
            members: None,
            copy: None,
            paused: paused.unwrap_or(false),
        };
        self.apart(move |daemon, peer| daemon.build_for(peer, ticket, &snapshot, what))
            .await
    }

    async fn build_copy(
        &self,
        ticket: Ticket,
        snapshot: SnapshotRef,
        copy: Name,
        paused: bool,
    ) -> RpcResult<()> {
        self.may(&snapshot.vne)?;
        self.may(&copy)?;
        let what = Building {
            members: None,
            copy: Some(copy),
            paused,
        };
        self.apart(move |daemon, peer| daemon.build_for(peer, ticket, &snapshot, what))
            .await
    }

    async fn build_members(
        &self,
        ticket: Ticket,
        snapshot: SnapshotRef,
        members: Vec<Name>,
        copy: Option<Name>,
        paused: bool,
    ) -> RpcResult<()> {
        self.may(&snapshot.vne)?;
        if let Some(copy) = &copy {
            self.may(copy)?;
        }
        let what = Building {
            members: Some(members),
            copy,
            paused,
        };
        self.apart(move |daemon, peer| daemon.build_for(peer, ticket, &snapshot, what))
            .await
    }

    async fn fit(
        &self,
        snapshot: SnapshotRef,
        members: Vec<Name>,
        copy: Option<Name>,
        needs: Needs,
    ) -> RpcResult<Fit> {
        self.may(&snapshot.vne)?;
        self.apart(move |daemon, peer| {
            daemon.fit_for(peer, &snapshot, (&members, copy.as_ref()), &needs)
        })
        .await
    }

    async fn send(&self, snapshot: SnapshotRef, host: Name) -> RpcResult<JobId> {
        self.may(&snapshot.vne)?;
        let begun = self.apart(move |daemon, peer| {
            daemon.check_gives(peer, &snapshot)?;
            let store = daemon.store(&snapshot.vne)?;
            daemon.start_copy(snapshot, store, host)
        });
        let job = begun.await?;
        lock(&self.sending).push(job);
        Ok(job)
    }

    async fn sent(&self, job: JobId) -> RpcResult<Watched> {
        self.still_a_peer()?;
        let own = lock(&self.sending).contains(&job);
        match self.daemon.jobs.get(job).filter(|_| own) {
            Some(job) => Ok(job.watch().await),
            None => Err(refusal("that copy isn't known here")),
        }
    }

    async fn built(&self, ticket: Ticket) -> RpcResult<RestoreState> {
        self.still_a_peer()?;
        let state = self.daemon.restore_state(&self.peer, &ticket);
        state.ok_or_else(|| refusal("that restore isn't known here"))
    }

    async fn release(&self, ticket: Ticket, paused: bool) -> RpcResult<()> {
        self.still_a_peer()?;
        let told = self.daemon.restore_release(&self.peer, &ticket, paused);
        told.ok_or_else(|| refusal("that restore isn't known here"))
    }

    async fn flow(&self, ticket: Ticket) -> RpcResult<()> {
        self.still_a_peer()?;
        let told = self.daemon.restore_flow(&self.peer, &ticket);
        told.ok_or_else(|| refusal("that restore isn't known here"))
    }

    async fn discard(&self, ticket: Ticket) -> RpcResult<()> {
        self.still_a_peer()?;
        self.daemon.restore_discard(&self.peer, &ticket);
        Ok(())
    }

    async fn outcome(&self, ticket: Ticket) -> RpcResult<RestoreOutcome> {
        self.still_a_peer()?;
        Ok(self.daemon.restore_outcome(&ticket))
    }

    async fn remove(&self, snapshot: SnapshotRef) -> RpcResult<bool> {
        self.may(&snapshot.vne)?;
        self.apart(move |daemon, peer| daemon.remove_for(peer, &snapshot))
            .await
    }

    async fn copy_begin(
        &self,
        snapshot: SnapshotRef,
        manifest: serde_json::Value,
    ) -> RpcResult<()> {
        self.may(&snapshot.vne)?;
        let receiving = self.apart(move |daemon, _| {
            let manifest: Manifest = serde_json::from_value(manifest)
                .map_err(|error| super::Error::Failed(format!("its manifest: {error}")))?;
            if manifest.vne != snapshot.vne || manifest.id != snapshot.id {
                let why = format!("its manifest isn't that of {snapshot}");
                return Err(super::Error::Failed(why));
            }
            let root = daemon.store(&snapshot.vne)?;
            Receiving::start(root, daemon.here(), manifest)
        });
        let receiving = Arc::new(receiving.await?);
        *lock(&self.receiving) = Some(receiving);
        Ok(())
    }

    async fn copy_state(&self) -> RpcResult<CopyState> {
        Ok(self.receiving()?.state().await)
    }

    async fn copy_member(&self, member: Name) -> RpcResult<()> {
        self.copy_begins(Step::Begin(member))
    }

    async fn copy_file(
        &self,
        member: Name,
        file: String,
        offset: u64,
        data: String,
    ) -> RpcResult<()> {
        let step = Step::File {
            member,
            file,
            offset,
            data,
        };
        self.copy_step(step).await.map(drop)
    }

    async fn copy_pages(&self, member: Name, pages: String) -> RpcResult<String> {
        self.copy_step(Step::Pages { member, pages }).await
    }

    async fn copy_frame(&self, member: Name, count: u32, data: String) -> RpcResult<()> {
        let step = Step::Frame {
            member,
            count,
            data,
        };
        self.copy_step(step).await.map(drop)
    }

    async fn copy_member_end(&self, member: Name) -> RpcResult<()> {
        self.copy_begins(Step::End(member))
    }

    async fn copy_end(&self) -> RpcResult<()> {
        self.copy_begins(Step::Finish)
    }
}
