//! HTTP/1.1 on a port of this machine: for faces that are asked so.

use std::{convert::Infallible, error::Error, sync::Arc, time::Duration};

use hyper::{Request, Response, body::Incoming, service::service_fn};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinSet,
};

/// How long a client may take to send the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);

/// Answers what is asked on `listener`, at most `max` connections at a time, until `stop`. What is under way
/// then is in what is returned: it ends with the request, and is cut off where that is dropped.
pub async fn serve<A, F, B>(
    listener: TcpListener,
    max: usize,
    stop: impl Future<Output = ()>,
    answer: A,
) -> JoinSet<()>
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: hyper::body::Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(max.max(1)));
    let (tell, told) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, stream) = tokio::select! {
            () = &mut stop => break,
            (slot, stream) = next => (slot, stream),
        };
        let stream = match stream {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, mostly: it passes.
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (mut told, answer) = (told.clone(), answer.clone());
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let answered = answer(request);
                async { Ok::<_, Infallible>(answered.await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(hyper_util::rt::TokioTimer::new())
                .header_read_timeout(HEAD_PATIENCE)
                .serve_connection(hyper_util::rt::TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            let served = tokio::select! {
                served = connection.as_mut() => served,
                // The sender is gone: it is to end.
                _ = told.changed() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = served {
                tracing::debug!(%error, "a client went away");
            }
            drop(slot);
        });
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    // One that was taken just now is closed unheard, once it is told to end.
    tokio::time::sleep(super::GREETING).await;
    drop(tell);
    connections
}
