//! The agent: faces of one node, in one process, on one store, with one keeper.
//!
//! A [`Face`] is a name and a function, which serves until its [`Life`] says that it is to end. It begins with
//! `Starting` and says itself when it serves; until all do, the agent is not ready. One that cannot start, or
//! ends by itself, is an error of the agent: the others are ended in order, and a supervisor starts it again.
//! A face whose peer may come later waits for it by itself, and says so by [`Life::waiting`].

use std::{pin::Pin, sync::Arc, time::Duration};

use anyhow::Context as _;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use crate::{
    admin::{Health, State},
    config::Config,
    mount::keeper::Link,
    node::Node,
};

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
    pub health: Arc<Health>,
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
    /// The parts of a node as `config` says.
    ///
    /// # Errors
    /// A keeper that cannot be reached.
    pub fn new(node: Node, config: Config, note: fn(&str)) -> anyhow::Result<Self> {
        let keeper = config.agent.keeper.as_deref();
        let keeper = keeper
            .map(Link::connect)
            .transpose()
            .context("the keeper of agent.keeper cannot be had")?;
        Ok(Self {
            node,
            config,
            keeper: keeper.map(Arc::new),
            health: Arc::default(),
            note,
        })
    }
}

/// Runs `faces` until `stop`, or until one of them fails.
///
/// # Errors
/// What made a face fail, with its name; what `stop` says.
pub async fn run(
    parts: Parts,
    faces: &[Face],
    stop: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    anyhow::ensure!(
        !faces.is_empty(),
        "no face is enabled in the configuration: say enabled = true in [snapshotter], [csi] or [mirror]"
    );
    let parts = Arc::new(parts);
    let (phase, told) = watch::channel(Phase::Serve);
    let (busy, mut drained) = mpsc::channel(1);
    let mut running = JoinSet::new();
    for face in faces {
        parts.health.set(face.name, State::Starting(String::new()));
        let life = Life {
            face: face.name,
            health: Arc::clone(&parts.health),
            phase: told.clone(),
            busy: Mutex::new(Some(busy.clone())),
        };
        let serving = (face.run)(Arc::clone(&parts), life);
        let name = face.name;
        running.spawn(async move { serving.await.with_context(|| format!("face {name}")) });
    }
    let mut done = tokio::select! {
        stopped = stop => stopped,
        Some(ended) = running.join_next() => match ended {
            Ok(Ok(())) => Err(anyhow::anyhow!("a face ended by itself")),
            Ok(Err(error)) => Err(error),
            Err(panic) => Err(anyhow::Error::new(panic).context("a face failed")),
        },
    };
    drop(busy);
    phase.send_replace(Phase::Stop);
    for face in faces {
        parts.health.set(face.name, State::Ending);
    }
    let draining = async {
        // Nothing is ever sent: it ends with the last sender.
        drained.recv().await;
        phase.send_replace(Phase::Leave);
        while let Some(ended) = running.join_next().await {
            if let Err(error) = ended.map_err(anyhow::Error::new).flatten() {
                match done {
                    Ok(()) => done = Err(error),
                    Err(_) => {
                        tracing::error!(error = format!("{error:#}"), "this face failed, too")
                    }
                }
            }
        }
    };
    let patience = Duration::from_secs(parts.config.agent.drain);
    if tokio::time::timeout(patience, draining).await.is_err() {
        tracing::warn!("what is still under way is given up");
    }
    done
}
