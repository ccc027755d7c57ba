//! HTTP/1.1 on a port of this machine: for faces that are asked so.

use std::{
    collections::HashMap,
    convert::Infallible,
    error::Error,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::{Request, Response, body::Incoming, service::service_fn};
use parking_lot::Mutex;
use tokio::{
    net::TcpListener,
    sync::{Notify, OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};

/// The connections that there may be.
struct Slots {
    free: Arc<Semaphore>,
    taken: Arc<Mutex<Taken>>,
}

/// By number of the connection: when it was made or has asked last, and what closes it.
#[derive(Default)]
struct Taken {
    next: u64,
    connections: HashMap<u64, (Instant, Arc<Notify>)>,
}

/// The right to a connection.
struct Slot {
    number: u64,
    taken: Arc<Mutex<Taken>>,
    close: Arc<Notify>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Slots {
    fn new(max: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(max.max(1))),
            taken: Arc::default(),
        }
    }

    async fn wait(&self) -> Slot {
        // It is never closed.
        let permit = Arc::clone(&self.free).acquire_owned().await.ok();
        let close = Arc::<Notify>::default();
        let number = {
            let mut taken = self.taken.lock();
            let number = taken.next;
            taken.next += 1;
            let entry = (Instant::now(), Arc::clone(&close));
            taken.connections.insert(number, entry);
            number
        };
        Slot {
            number,
            taken: Arc::clone(&self.taken),
            close,
            _permit: permit,
        }
    }

    /// As [`Slots::wait`]; closes the oldest connection where there is none.
    async fn make(&self) -> Slot {
        if self.free.available_permits() == 0 {
            let taken = self.taken.lock();
            let oldest = taken.connections.values().min_by_key(|(at, _)| *at);
            oldest.into_iter().for_each(|(_, close)| close.notify_one());
        }
        self.wait().await
    }
}

impl Slot {
    fn uses(&self) -> Uses {
        Uses {
            number: self.number,
            taken: Arc::clone(&self.taken),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.taken.lock().connections.remove(&self.number);
    }
}

/// Notes what is asked on a connection.
struct Uses {
    number: u64,
    taken: Arc<Mutex<Taken>>,
}

impl Uses {
    fn asked(&self) {
        if let Some((at, _)) = self.taken.lock().connections.get_mut(&self.number) {
            *at = Instant::now();
        }
    }
}

/// How long a client may take to send the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);

/// What becomes of one connection more than there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// It waits until another one ends.
    Waits,
    /// The one that has asked nothing for the longest time is closed for it: nobody keeps the others out by staying. For
    /// answers that are short.
    ClosesOldest,
}

/// Answers what is asked on `listener`, at most `max` connections at a time, until `stop`. What is under way
/// then is in what is returned: it ends with the request, and is cut off where that is dropped.
pub async fn serve<A, F, B>(
    listener: TcpListener,
    (max, full): (usize, Full),
    stop: impl Future<Output = ()>,
    answer: A,
) -> JoinSet<()>
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: hyper::body::Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
    let slots = Slots::new(max);
    let (tell, told) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let next = async {
            // Without a slot nothing is taken, unless one can be made.
            let slot = match full {
                Full::Waits => Some(slots.wait().await),
                Full::ClosesOldest => None,
            };
            let stream = listener.accept().await;
            let slot = match slot {
                Some(slot) => slot,
                None => slots.make().await,
            };
            (slot, stream)
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
            let (closed, uses) = (Arc::clone(&slot.close), slot.uses());
            let service = service_fn(move |request| {
                uses.asked();
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
                () = closed.notified() => Ok(()),
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

#[cfg(test)]
mod tests {
    use http_body_util::Full as Body;
    use hyper::body::Bytes;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;

    async fn ask(stream: &mut TcpStream) {
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut answer = [0; 15];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
    }

    #[tokio::test]
    async fn who_stays_keeps_nobody_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = |_| std::future::ready(Response::new(Body::new(Bytes::new())));
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let stopped = async { drop(stopped.await) };
        let serving = tokio::spawn(serve(listener, (2, Full::ClosesOldest), stopped, answer));
        let connect = || TcpStream::connect(address);
        // One that never says anything, and one that does.
        let (mut silent, mut busy) = (connect().await.unwrap(), connect().await.unwrap());
        ask(&mut busy).await;
        let mut probe = connect().await.unwrap();
        ask(&mut probe).await;
        assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0, "it is closed");
        for _ in 0..20 {
            ask(&mut connect().await.unwrap()).await;
        }
        stop.send(()).unwrap();
        serving.await.unwrap();
    }
}
