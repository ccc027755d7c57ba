//! What the mirror passes on where the store has no room.

use hearth::{
    digest::ObjectId,
    fetch::{self, Engine},
    mirror,
    node::Node,
    store::{self, ByteSize, Store},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::*;

/// The body of an answer, as far as it came.
async fn get(address: std::net::SocketAddr, target: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let ask = format!("GET {target} HTTP/1.1\r\nhost: mirror\r\nconnection: close\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // One that breaks off ends as one that does not.
    let _ = stream.read_to_end(&mut answer).await;
    let head = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{:?}", &answer[..20]);
    answer.split_off(head + 4)
}

/// Nothing is stored of what does not fit, and it is verified all the same before its end is given.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_without_room_is_passed_on_and_verified() {
    let blob = data((7 << 19) + 11);
    let digest = Digest::of(&blob);
    let mut wrong = blob.clone();
    wrong[5] ^= 1;
    for (given, min_free, is_good, is_kept) in [
        (&blob, 0, true, true),
        (&blob, u64::MAX / 2, true, false),
        (&wrong, u64::MAX / 2, false, false),
    ] {
        let given = given.clone();
        let registry = Scripted::start(move |seen| Reply::good(seen, &given, "\"x\"")).await;
        let dir = tempfile::tempdir().unwrap();
        let config = store::Config {
            min_free: ByteSize(min_free),
            ..Default::default()
        };
        let store = Store::open(dir.path(), &config).unwrap();
        let engine = Engine::new(Arc::clone(&store), fetch::Config::default());
        let node = Node::new(engine, Sources::new(Settings::new().config()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            mirror::serve(listener, node, &mirror::Config::default(), stopped).await
        });
        let target = format!("/v2/team/app/blobs/{digest}?ns={}", registry.address);
        let body = get(address, &target).await;
        match is_good {
            true => assert!(body == blob, "{} bytes", body.len()),
            false => assert!(body.len() < blob.len(), "a wrong blob was given whole"),
        }
        let kept = store.complete(&ObjectId::Sha256(digest)).unwrap();
        assert_eq!(kept.is_some(), is_kept);
        drop(stop);
        serving.await.unwrap().join_all().await;
    }
}
