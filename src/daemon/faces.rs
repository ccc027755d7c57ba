//! The faces of the agent: each a function that puts its parts together and serves.

use std::{
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use anyhow::Context as _;
use tokio::{net::TcpListener, task::JoinSet};

use super::{
    ImageRoots, NodeWarmer, PodContent, SharedModels,
    agent::{Face, Life, Parts},
    pinned_images,
};
use crate::{
    admin,
    config::Config,
    csi,
    kube::{self, Pods},
    mirror, mount,
    snapshotter::{self, Snapshotter},
};

pub const ADMIN: Face = Face {
    name: "admin",
    run: |parts, life| Box::pin(admin(parts, life)),
};
pub const SNAPSHOTTER: Face = Face {
    name: "snapshotter",
    run: |parts, life| Box::pin(snapshotter(parts, life)),
};
pub const CSI: Face = Face {
    name: "csi",
    run: |parts, life| Box::pin(csi(parts, life)),
};
pub const MIRROR: Face = Face {
    name: "mirror",
    run: |parts, life| Box::pin(mirror(parts, life)),
};

pub const KUBE: Face = Face {
    name: "kube",
    run: |parts, life| Box::pin(kube(parts, life)),
};
pub const WARMUPS: Face = Face {
    name: "warmups",
    run: |parts, life| Box::pin(warmups(parts, life)),
};
pub const CONTROLLER: Face = Face {
    name: "controller",
    run: |parts, life| Box::pin(controller(parts, life)),
};

/// The faces that `config` enables.
pub fn enabled(config: &Config) -> Vec<Face> {
    let all = [
        (config.admin.enabled, ADMIN),
        (config.snapshotter.enabled, SNAPSHOTTER),
        (config.csi.enabled, CSI),
        (config.mirror.enabled, MIRROR),
        (config.kube.enabled, KUBE),
        (config.kube.warmups.enabled, WARMUPS),
        (config.kube.controller.enabled, CONTROLLER),
    ];
    let enabled = all.into_iter().filter(|(enabled, _)| *enabled);
    enabled.map(|(_, face)| face).collect()
}

async fn admin(parts: Arc<Parts>, life: Life) -> anyhow::Result<()> {
    let listener = listen(&parts, &life, parts.config.admin.address).await?;
    (parts.note)(&format!("admin on http://{}", listener.local_addr()?));
    life.serving();
    // It answers to the end: who probes is to see how the others end.
    life.drained();
    let health = Arc::clone(&parts.health);
    let under_way = admin::serve(listener, health, life.ended()).await;
    finish(under_way).await;
    Ok(())
}

async fn mirror(parts: Arc<Parts>, life: Life) -> anyhow::Result<()> {
    let config = &parts.config.mirror;
    let listener = listen(&parts, &life, config.address).await?;
    (parts.note)(&format!("mirror on http://{}", listener.local_addr()?));
    life.serving();
    let under_way = mirror::serve(listener, parts.node.clone(), config, life.stopped()).await;
    life.drained();
    finish(under_way).await;
    Ok(())
}

/// How often it is looked whether there is a kubeconfig by now.
const LOOK: Duration = Duration::from_secs(1);

/// A client of the API server; `None` where the face is to end before there can be one. A kubeconfig may come later, and
/// what it names later still: the kubelet writes its own when it has joined the cluster.
async fn connect(parts: &Parts, life: &Life) -> anyhow::Result<Option<::kube::Client>> {
    let config = &parts.config.kube.api;
    let mut told = String::new();
    loop {
        match kube::connect(config).await {
            Err(
                error @ (kube::ConnectError::Kubeconfig { .. } | kube::ConnectError::Client(_)),
            ) if config.kubeconfig.is_some() => {
                let why = super::describe(&error);
                if why != told {
                    tracing::warn!(face = life.face(), "{why}: waiting for it");
                    told.clone_from(&why);
                }
                life.waiting(why);
            }
            connected => return Ok(Some(connected?)),
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = life.stopped() => return Ok(None),
        }
    }
}

async fn kube(parts: Arc<Parts>, life: Life) -> anyhow::Result<()> {
    let Some(client) = connect(&parts, &life).await? else {
        return Ok(());
    };
    let content = PodContent::new(parts.node.clone());
    let pods = Pods::new(
        client,
        parts.config.agent.node_name(),
        &parts.config.kube,
        content,
    );
    life.waiting("the API server has not said yet which pods are here");
    let serving = async {
        pods.listed().await;
        life.serving();
        std::future::pending().await
    };
    tokio::select! {
        () = Arc::clone(&pods).run() => {}
        () = serving => {}
        () = life.stopped() => {}
    }
    life.drained();
    Ok(())
}

async fn csi(parts: Arc<Parts>, life: Life) -> anyhow::Result<()> {
    let config = parts.config.csi.clone();
    if config.node {
        mount::available()?;
    }
    let settings = csi::Settings {
        store: parts.node.store().root().to_owned(),
        node_id: parts.config.agent.node_name(),
        config: config.clone(),
    };
    // First, so that nothing is touched that another process serves.
    let listener = parts.sockets.unix(life.face(), &config.endpoint)?;
    let mounts = parts.config.mount.clone();
    let models = SharedModels::new(parts.node.clone(), mounts, parts.keeper.clone());
    let driver = csi::Driver::open(settings, models.clone(), Arc::new(csi::Binds)).await?;
    let records = Arc::downgrade(&driver);
    (parts.note)(&format!("csi on {}", listener.path().display()));
    life.serving();
    let stop = async {
        life.stopped().await;
        models.stop();
    };
    let served = csi::serve(driver, listener, stop).await;
    if served.is_ok() {
        tokio::select! {
            () = gone(records) => life.drained(),
            () = life.ended() => {}
        }
        life.ended().await;
    }
    // However it ends: what the keeper has is for the next process.
    models.leave_all().await;
    Ok(served?)
}

async fn snapshotter(parts: Arc<Parts>, life: Life) -> anyhow::Result<()> {
    let (node, keeper) = (parts.node.clone(), parts.keeper.clone());
    let (store, mounts) = (Arc::clone(node.store()), parts.config.mount.clone());
    let config = &parts.config.snapshotter;
    let root = match &config.root {
        Some(root) => std::path::absolute(root)?,
        None => store.root().join("snapshots"),
    };
    let settings = snapshotter::Settings {
        root: root.clone(),
        sync: config.sync,
    };
    // It mounts something to see whether that works.
    let roots = tokio::task::spawn_blocking(move || ImageRoots::new(node, mounts, keeper));
    let roots = roots.await?;
    // Before anything else: containers may be waiting.
    let all = roots.adopt().await;
    let mut aside = JoinSet::new();
    if !all {
        let roots = Arc::clone(&roots);
        aside.spawn(async move { roots.adopt_the_rest().await });
    }
    if let Some(containerd) = config.containerd.clone() {
        let pinned = async move || {
            let store = Arc::clone(&store);
            let found = tokio::task::spawn_blocking(move || pinned_images(&store));
            anyhow::Ok(found.await??)
        };
        aside.spawn(snapshotter::keep_pinned(containerd, pinned));
    }
    let served = async {
        let snapshotter = Snapshotter::open(settings, roots.clone())?;
        let records = Arc::downgrade(&snapshotter);
        snapshotter.sweep().await;
        snapshotter::check_overlay(&root)?;
        let listener = parts.sockets.unix(life.face(), &config.address)?;
        (parts.note)(&format!(
            "snapshotter on {}, snapshots in {}",
            listener.path().display(),
            root.display()
        ));
        life.serving();
        snapshotter::serve(snapshotter, listener, life.stopped()).await?;
        tokio::select! {
            () = gone(records) => life.drained(),
            () = life.ended() => {}
        }
        anyhow::Ok(())
    };
    let served = served.await;
    drop(aside);
    if served.is_ok() {
        life.ended().await;
    }
    // However it ends: what the keeper has is for the next process.
    roots.leave().await;
    served
}

async fn warmups(parts: Arc<Parts>, life: Life) -> anyhow::Result<()> {
    let config = &parts.config.kube;
    let Some(client) = connect(&parts, &life).await? else {
        return Ok(());
    };
    let settings = kube::warmups::Settings {
        node: parts.config.agent.node_name(),
        report: Duration::from_secs(config.warmups.report_seconds),
    };
    let warmer = Arc::new(NodeWarmer::new(parts.node.clone()));
    (parts.note)(&format!("warm-ups of node {}", settings.node));
    life.serving();
    tokio::select! {
        () = kube::warmups::run(client, settings, warmer) => {}
        () = life.stopped() => {}
    }
    life.drained();
    Ok(())
}

async fn controller(parts: Arc<Parts>, life: Life) -> anyhow::Result<()> {
    let config = &parts.config.kube;
    let Some(client) = connect(&parts, &life).await? else {
        return Ok(());
    };
    let name = std::env::var("POD_NAME").unwrap_or_else(|_| parts.config.agent.node_name());
    (parts.note)("controller of the cluster's Warmups");
    // Whether it leads or waits.
    life.serving();
    kube::controller::run(client, config.controller.clone(), name, life.stopped()).await;
    life.drained();
    Ok(())
}

async fn listen(parts: &Parts, life: &Life, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = parts.sockets.tcp(life.face(), address).await;
    listener.with_context(|| format!("cannot listen on {address}"))
}

/// Waits until nobody has it any more: what works on after its client went away is done, and locks are free.
async fn gone<T>(of: Weak<T>) {
    while of.strong_count() > 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Lets answers under way be finished, within bounds.
async fn finish(under_way: JoinSet<()>) {
    const PATIENCE: Duration = Duration::from_secs(10);
    if tokio::time::timeout(PATIENCE, under_way.join_all())
        .await
        .is_err()
    {
        tracing::warn!("answers under way are cut off");
    }
}
