//! The background fetch of a model.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::sync::watch;

use super::of_node;
use crate::{
    csi::ModelError,
    mount::Mount,
    node::{Node, NodeError, Progress, Resolved},
};

/// How long it leaves the origin to whoever opens the first file.
const HEAD_START: Duration = Duration::from_millis(100);

/// The background fetch of a model.
pub(super) struct Fill {
    task: tokio::task::JoinHandle<()>,
    pub(super) progress: Arc<Progress>,
    pub(super) state: watch::Receiver<Filling>,
}

/// How far the background fetch is.
#[derive(Debug, Clone)]
pub(super) enum Filling {
    Going,
    Done,
    Failed(ModelError),
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fill {
    /// Fetches what `mount` shows. Should that turn out false, nothing of it is shown any more.
    pub(super) fn start(node: Node, resolved: Resolved, mount: Weak<Mount>) -> Self {
        let progress = Arc::new(Progress::default());
        let (tell, state) = watch::channel(Filling::Going);
        let shown = Arc::clone(&progress);
        let task = tokio::spawn(async move {
            tokio::time::sleep(HEAD_START).await;
            // Failed until it is known to be done: a volume must not look well between two tries.
            let waits = |error: Option<&NodeError>| {
                if let Some(error) = error {
                    tell.send_replace(Filling::Failed(of_node(error)));
                }
            };
            match node.fill(&resolved, &shown, waits).await {
                Ok(()) => tell.send_replace(Filling::Done),
                Err(error) if error.is_cancelled() => return,
                Err(error) => {
                    let refuted = error.is_refuted();
                    let (model, error) = (&resolved.artifact.reference, of_node(&error));
                    tracing::warn!(model, %error, "only what is read is fetched");
                    if let Some(mount) = mount.upgrade().filter(|_| refuted) {
                        mount.refuse(error.to_string());
                    }
                    tell.send_replace(Filling::Failed(error))
                }
            };
        });
        Self {
            task,
            progress,
            state,
        }
    }
}
