//! The agent: faces of one node, in one process, on one store, with one keeper.
//!
//! A [`Face`] is a name and a function, which serves until its [`Life`] says that it is to end. It begins with
//! `Starting` and says itself when it serves; until all do, the agent is not ready. One that cannot start, or
//! ends by itself, is an error of the agent: the others are ended in order, and a supervisor starts it again.
//! A face whose peer may come later waits for it by itself, and says so by [`Life::waiting`].

use std::{
    collections::BTreeMap, os::fd::AsFd as _, path::PathBuf, pin::Pin, sync::Arc, time::Duration,
};

use anyhow::Context as _;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tracing::Span;

use super::{
    handover::{Door, Predecessor, Successor},
    tidy::tidy,
};
use crate::{
    admin::{Health, State},
    config::Config,
    mount::keeper::Link,
    node::Node,
    socket::{Passed, Sockets, address_id, service},
    telemetry::{self, span},
};

/// How the service manager calls the sockets that it keeps: this, the face, `-`, and the id of the address.
const LISTENS: &str = "listens-";

/// How long everything may take to serve before an agent that takes over gives up.
const STARTING: Duration = Duration::from_secs(60);
/// How long its mounts may take after that.
const ADOPTING: Duration = Duration::from_secs(30);

/// How the keeper is called where faces are.
const KEEPER: &str = "keeper";
/// How often it is looked whether it is there.
const LOOK: Duration = Duration::from_secs(1);

/// A face at work.
pub type Running = Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>;

/// A way in.
#[derive(Clone, Copy)]
pub struct Face {
    /// Its name in the configuration, in messages and for `/readyz`.
    pub name: &'static str,
    /// Serves until it is told to end.
    pub run: fn(Arc<Parts>, Life) -> Running,
}

/// What faces are made of.
pub struct Parts {
    pub node: Node,
    pub config: Config,
    /// Has the mounts, where there is one.
    pub keeper: Option<Arc<Link>>,
    /// What is listened on.
    pub sockets: Sockets,
    /// Names under which the service manager had sockets of the process before this one.
    listened: Vec<String>,
    pub health: Arc<Health>,
    /// Where the next agent asks this one to hand over, where it may.
    pub door: Option<PathBuf>,
    /// Tells a person what serves where.
    pub note: fn(&str),
}

/// How far the agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Phase {
    Serve,
    /// Take no more requests, finish those under way.
    Stop,
    /// Let mounts go.
    Leave,
}

/// What the agent and one of its faces tell each other.
pub struct Life {
    face: &'static str,
    health: Arc<Health>,
    phase: watch::Receiver<Phase>,
    /// Dropped once nothing is under way any more.
    busy: Mutex<Option<mpsc::Sender<()>>>,
}

impl Life {
    /// The name of the face.
    pub fn face(&self) -> &'static str {
        self.face
    }

    /// The face serves.
    pub fn serving(&self) {
        if *self.phase.borrow() == Phase::Serve {
            self.health.set(self.face, State::Serving);
        }
    }

    /// The face does not serve yet, since it waits for something else.
    pub fn waiting(&self, why: impl Into<String>) {
        if *self.phase.borrow() == Phase::Serve {
            self.health.set(self.face, State::Starting(why.into()));
        }
    }

    /// Returns once the face is to take no more requests. What it has mounted it goes on serving.
    pub fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        self.reached(Phase::Stop)
    }

    /// Returns once the face is to let go of everything. It comes after [`Life::stopped`], and after all
    /// faces have finished what was under way.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        self.reached(Phase::Leave)
    }

    fn reached(&self, wanted: Phase) -> impl Future<Output = ()> + Send + use<> {
        let mut phase = self.phase.clone();
        async move {
            // An agent that is gone has ended.
            let _ = phase.wait_for(|phase| *phase >= wanted).await;
        }
    }

    /// The face has nothing under way, and will not, for which the others would have to wait.
    pub fn drained(&self) {
        self.busy.lock().take();
    }
}

impl Parts {
    /// The parts of a node as `config` says. Must be called within a runtime.
    ///
    /// # Errors
    /// A keeper that cannot be reached.
    pub fn new(node: Node, config: Config, note: fn(&str)) -> anyhow::Result<Self> {
        let mut passed = service::passed();
        let keeper = match (&config.agent.keeper, config.agent.fdstore) {
            (Some(_), true) => anyhow::bail!("agent.keeper and agent.fdstore exclude each other"),
            (Some(path), false) => {
                Some(Link::connect(path).context("the keeper of agent.keeper cannot be had")?)
            }
            (None, true) => {
                let patience = Duration::from_secs(config.mount.orphan_timeout);
                Some(Link::managed(&mut passed, patience)?)
            }
            (None, false) => None,
        };
        let listened = passed.iter().map(|(name, _)| name.clone());
        let listened = listened.filter(|name| name.starts_with(LISTENS)).collect();
        let sockets = passed.into_iter().filter_map(|(name, socket)| {
            let (face, address) = name.strip_prefix(LISTENS)?.split_once('-')?;
            Some(Passed {
                face: face.to_owned(),
                address: address.to_owned(),
                socket,
            })
        });
        let sockets = Sockets::with(sockets.collect());
        Ok(Self {
            node,
            config,
            keeper: keeper.map(Arc::new),
            sockets,
            listened,
            health: Arc::default(),
            door: None,
            note,
        })
    }

    /// Tells the service manager, where there is one, that everything serves; has it keep the sockets, where
    /// it is to.
    fn tell_ready(&self) -> std::io::Result<()> {
        if self.config.agent.fdstore {
            let sockets = self.sockets.pass()?.into_iter().map(|passed| {
                let address = address_id(&passed.address);
                (format!("{LISTENS}{}-{address}", passed.face), passed)
            });
            let sockets: BTreeMap<_, _> = sockets.collect();
            // Nobody accepts any more where this process does not listen.
            for name in self
                .listened
                .iter()
                .filter(|name| !sockets.contains_key(*name))
            {
                service::forget(name)?;
            }
            for (name, passed) in sockets {
                // It may have one of that name already, of the process before this one.
                service::forget(&name)?;
                service::store(&name, &[passed.socket.as_fd()])?;
            }
        }
        service::notify("READY=1", &[]).map(drop)
    }

    /// Whether what is mounted can be taken over while this process runs.
    fn kept(&self) -> bool {
        let mounts = self.config.csi.enabled || self.config.snapshotter.enabled;
        self.config.agent.keeper.is_some() || !mounts
    }

    /// The mounts of this store that the keeper has and somebody serves, with how many servers they have had.
    ///
    /// # Errors
    /// One that this version cannot serve.
    async fn served(&self) -> anyhow::Result<BTreeMap<PathBuf, u32>> {
        let Some(keeper) = self.keeper.clone() else {
            return Ok(BTreeMap::new());
        };
        let run = super::run_dir(&self.node);
        let served = tokio::task::spawn_blocking(move || {
            let mut served = BTreeMap::new();
            for kept in keeper.sessions()? {
                if kept.server.is_some() && kept.dir().starts_with(&run) {
                    keeper.show(kept.dir())?;
                    served.insert(kept.dir().to_owned(), kept.servers);
                }
            }
            anyhow::Ok(served)
        });
        served.await?
    }
}

/// The faces at work.
struct Group {
    parts: Arc<Parts>,
    running: JoinSet<anyhow::Result<()>>,
    phase: watch::Sender<Phase>,
    /// Ends once nobody has anything under way.
    drained: mpsc::Receiver<()>,
}

impl Group {
    fn start(parts: &Arc<Parts>, faces: &[Face]) -> Self {
        let (phase, told) = watch::channel(Phase::Serve);
        let (busy, drained) = mpsc::channel(1);
        // First all of them: it is not started before each has.
        for face in faces {
            parts.health.set(face.name, State::Starting(String::new()));
        }
        let mut running = JoinSet::new();
        for face in faces {
            let life = Life {
                face: face.name,
                health: Arc::clone(&parts.health),
                phase: told.clone(),
                busy: Mutex::new(Some(busy.clone())),
            };
            let serving = (face.run)(Arc::clone(parts), life);
            let name = face.name;
            running.spawn(async move { serving.await.with_context(|| format!("face {name}")) });
        }
        Self {
            parts: Arc::clone(parts),
            running,
            phase,
            drained,
        }
    }

    /// Why a face has ended by itself, once one has.
    async fn failed(&mut self) -> anyhow::Error {
        match self.running.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Err(panic)) => anyhow::Error::new(panic).context("a face failed"),
            _ => anyhow::anyhow!("a face ended by itself"),
        }
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(self.parts.config.agent.drain)
    }

    /// Has all faces take no more requests; whether they have finished those under way in time.
    async fn stop(&mut self, faces: &[Face]) -> bool {
        self.phase.send_replace(Phase::Stop);
        for face in faces {
            self.parts.health.set(face.name, State::Ending);
        }
        // Nothing is ever sent: it ends with the last sender.
        let drained = tokio::time::timeout(self.patience(), self.drained.recv()).await;
        drained.is_ok()
    }

    /// Has all faces let go of everything, and waits for them, within bounds.
    ///
    /// # Errors
    /// What made a face fail meanwhile.
    async fn leave(mut self) -> anyhow::Result<()> {
        self.phase.send_replace(Phase::Leave);
        let patience = self.patience();
        let mut done = Ok(());
        let ending = async {
            while let Some(ended) = self.running.join_next().await {
                if let Err(error) = ended.map_err(anyhow::Error::new).flatten() {
                    tracing::error!(error = format!("{error:#}"), "a face failed at its end");
                    done = Err(error);
                }
            }
        };
        if tokio::time::timeout(patience, ending).await.is_err() {
            tracing::warn!("what is still under way is given up");
        }
        done
    }
}

/// Runs `faces` until `stop`, until one of them fails, or until another agent has taken over. Takes over from
/// the one that runs, where there is one.
///
/// # Errors
/// What made a face fail, with its name; what `stop` says; that the agent which runs does not hand over.
pub async fn run(
    mut parts: Parts,
    faces: &[Face],
    stop: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    anyhow::ensure!(
        !faces.is_empty(),
        "no face is enabled in the configuration: say enabled = true in [snapshotter], [csi], [mirror] or [kube]"
    );
    let (store, kept) = (parts.node.store().id().to_owned(), parts.kept());
    let mut predecessor = match &parts.door {
        Some(door) => Predecessor::find(door, &store, kept).await?,
        None => None,
    };
    let mut served = BTreeMap::new();
    let mut taking = Span::none();
    if let Some(predecessor) = &predecessor {
        let (process, version) = (predecessor.process, &predecessor.version);
        taking = span!(
            "take over",
            hearth.other.pid = process,
            hearth.other.version = version
        );
        let goes_on = "the agent that runs has a mount that this version cannot serve: it goes on";
        let asked = async {
            let served = parts.served().await.context(goes_on)?;
            anyhow::Ok((served, predecessor.hand_over().await?))
        };
        let given = asked.await.inspect_err(|error| {
            telemetry::fail(&taking, "Refused".to_owned(), error.as_ref());
        });
        let (mounts, sockets) = given?;
        (served, parts.sockets) = (mounts, Sockets::with(sockets));
        telemetry::count(&taking, "hearth.mounts", served.len() as u64);
        tracing::info!(process, version, mounts = served.len(), "takes over");
    }
    let parts = Arc::new(parts);
    // They end with this function.
    let mut aside = JoinSet::new();
    aside.spawn(tidy(Arc::clone(parts.node.store())));
    aside.spawn(watch_keeper(Arc::clone(&parts)));
    let mut stop = std::pin::pin!(stop);
    let mut door = None;
    'again: loop {
        let mut group = Group::start(&parts, faces);
        let mut started = false;
        let mut given = false;
        let done = loop {
            let deadline = async {
                match predecessor.is_some() {
                    true => tokio::time::sleep(STARTING).await,
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                stopped = &mut stop => break stopped,
                error = group.failed() => break Err(error),
                () = deadline => break Err(anyhow::anyhow!("not everything serves: {}", parts.health)),
                () = parts.health.started(), if !started => {
                    started = true;
                    if predecessor.is_some()
                        && let Err(error) = all_taken(&parts, &served).await
                    {
                        break Err(error);
                    }
                    if let Some(at) = parts.door.as_deref().filter(|_| door.is_none()) {
                        door = match Door::open(at, &store, kept) {
                            Ok(door) => Some(door),
                            // Where nobody has handed over to it, nobody may ever ask this one to.
                            Err(error) if predecessor.is_none() => {
                                tracing::warn!(%error, "cannot listen on {}: no other agent can take over from this one", at.display());
                                None
                            }
                            Err(error) => {
                                let what = format!("cannot listen on {}", at.display());
                                break Err(anyhow::Error::new(error).context(what));
                            }
                        };
                    }
                    predecessor.take().into_iter().for_each(Predecessor::release);
                    taking = Span::none();
                    parts.sockets.close_unused();
                    if let Err(error) = parts.tell_ready() {
                        break Err(anyhow::Error::new(error).context("the service manager"));
                    }
                }
                successor = next(door.as_ref()), if started => {
                    let (process, version) = (successor.process, &*successor.version);
                    tracing::info!(process, version, "hands over");
                    let giving = span!("hand over", hearth.other.pid = process, hearth.other.version = version);
                    if !group.stop(faces).await {
                        successor.refuse("what is under way in the agent that runs takes too long");
                        // Only then are records free; who connects meanwhile waits.
                        tokio::select! {
                            stopped = &mut stop => break stopped,
                            _ = group.drained.recv() => {}
                        }
                    } else if let Err(error) = successor.give(&parts.sockets) {
                        tracing::error!(%error, "the sockets cannot be handed over");
                    } else {
                        given = true;
                        let serves = tokio::select! {
                            stopped = &mut stop => break stopped,
                            serves = successor.serves() => serves,
                        };
                        if serves {
                            parts.sockets.leave();
                            group.leave().await?;
                            drop(giving);
                            tracing::info!(process, "handed over");
                            return match parts.config.agent.linger {
                                true => stop.await,
                                false => Ok(()),
                            };
                        }
                    }
                    let failed = anyhow::anyhow!("the agent that wanted to take over failed");
                    telemetry::fail(&giving, "Refused".to_owned(), &*failed);
                    tracing::error!(process, "the agent that wanted to take over failed: this one goes on");
                    let _ = group.leave().await;
                    continue 'again;
                }
            }
        };
        if let Err(error) = service::notify("STOPPING=1", &[]) {
            tracing::warn!(%error, "the service manager is not told");
        }
        if let (Err(error), Some(_)) = (&done, &predecessor) {
            telemetry::fail(&taking, "Failed".to_owned(), error.as_ref());
        }
        // What is listened on may be for the next process, or for the one before.
        let passed = given || predecessor.is_some() || parts.config.agent.fdstore;
        if !passed {
            // Better refused than kept waiting.
            parts.sockets.close();
        }
        group.stop(faces).await;
        let left = group.leave().await;
        match predecessor {
            Some(_) => parts.sockets.give_back(),
            None if passed => parts.sockets.leave(),
            // A face may just have begun to listen.
            None => parts.sockets.close(),
        }
        return done.and(left);
    }
}

/// Connects to the keeper again whenever it was lost. What is mounted goes on meanwhile; the agent is not ready.
async fn watch_keeper(parts: Arc<Parts>) {
    let Some(keeper) = &parts.keeper else { return };
    let mut is_lost = false;
    loop {
        tokio::time::sleep(LOOK).await;
        if !keeper.is_lost() {
            continue;
        }
        let lost = Arc::clone(keeper);
        match tokio::task::spawn_blocking(move || lost.revive()).await {
            Ok(Ok(())) => {
                tracing::info!("the keeper is back");
                parts.health.set(KEEPER, State::Serving);
                is_lost = false;
            }
            Ok(Err(error)) => {
                if !std::mem::replace(&mut is_lost, true) {
                    tracing::error!(%error, "the keeper is gone: what is mounted goes on");
                }
                parts.health.set(KEEPER, State::Starting(error.to_string()));
            }
            Err(_) => return,
        }
    }
}

async fn next(door: Option<&Door>) -> Successor {
    match door {
        Some(door) => door.successor().await,
        None => std::future::pending().await,
    }
}

/// Waits until every mount of `before` has had another server since, or is gone.
async fn all_taken(parts: &Parts, before: &BTreeMap<PathBuf, u32>) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + ADOPTING;
    loop {
        let mut now = parts.served().await?;
        now.retain(|dir, servers| before.get(dir).is_some_and(|before| *servers <= *before));
        if now.is_empty() {
            return Ok(());
        }
        if tokio::time::Instant::now() >= deadline {
            let dirs: Vec<_> = now.keys().map(|dir| dir.display().to_string()).collect();
            anyhow::bail!(
                "cannot take over the mounts on {}: the agent that runs goes on",
                dirs.join(", ")
            );
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
