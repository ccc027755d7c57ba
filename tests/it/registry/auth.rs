//! Tokens and passwords.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_token_serves_all_and_is_renewed_in_flight() {
    let mut held = Held::default();
    let layer = data(64 << 10);
    held.image("1", "amd64", std::slice::from_ref(&layer));
    let guarded = Guarded::new(held, 300);
    let answers = guarded.clone();
    let server = Scripted::start(move |seen| answers.answer(seen)).await;
    let host = server.address.to_string();
    let entry = json!({ "username": "me", "password": SECRET });
    let settings = Settings::new().login(&host, entry);
    let reference = format!("oci://{host}/team/app:1");
    let blob = digest(&layer);
    let ranges = async |source: &Arc<dyn Source>| {
        let reads = (0..16_u64).map(|n| read(source, &blob, n * 4096..(n + 1) * 4096));
        for (n, found) in join_all(reads).await.into_iter().enumerate() {
            assert_eq!(found.unwrap(), layer[n * 4096..(n + 1) * 4096]);
        }
    };

    // Many ranges at once, first of all: one finds out, one token is fetched.
    let source = settings.open(&reference);
    ranges(&source).await;
    let log = server.take_log();
    let asked: Vec<_> = log.iter().filter(|seen| seen.path() == "/token").collect();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].method, "GET");
    assert_eq!(
        asked[0].target,
        "/token?service=reg&scope=repository%3Ateam%2Fapp%3Apull"
    );
    // me:geheim
    assert_eq!(asked[0].header("authorization"), Some("Basic bWU6Z2VoZWlt"));
    assert_eq!(log.len(), 18, "16 ranges, one of them twice, and a token");

    // It is taken back in the middle: one of the readers fetches another for all.
    guarded.expired.store(true, Ordering::SeqCst);
    ranges(&source).await;
    assert_eq!(guarded.granted.load(Ordering::SeqCst), 2);
    layered(&source, &reference).await.unwrap();
    assert_eq!(guarded.granted.load(Ordering::SeqCst), 2);
    assert!(!format!("{source:?}").contains(SECRET));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_renewed_before_it_ends() {
    let mut held = Held::default();
    let layer = data(100);
    held.blob(&layer);
    let guarded = Guarded::new(held, 3);
    let answers = guarded.clone();
    let server = Scripted::start(move |seen| answers.answer(seen)).await;
    let settings = Settings::new();
    let source = settings.open(&format!("oci://{}/team/app:1", server.address));
    let blob = digest(&layer);
    for round in 1..4 {
        if round > 1 {
            tokio::time::sleep(Duration::from_millis(3050)).await;
        }
        let reads = (0..8_u64).map(|n| read(&source, &blob, n..n + 1));
        for found in join_all(reads).await {
            found.unwrap();
        }
        assert_eq!(guarded.granted.load(Ordering::SeqCst), round);
    }
    let refused = server
        .take_log()
        .iter()
        .filter(|seen| seen.path() != "/token" && seen.header("authorization").is_none())
        .count();
    assert_eq!(
        refused, 1,
        "after the first, no request goes out without a token"
    );
}

/// Who waits for a token that cannot be had does not wait once more for itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_server_that_is_down_is_asked_once_for_all_who_wait() {
    let mut held = Held::default();
    let layer = data(100);
    held.blob(&layer);
    let guarded = Guarded::new(held, 300);
    let answers = guarded.clone();
    let server = Scripted::start(move |seen| answers.answer(seen)).await;
    let settings = Settings::new();
    let source = settings.open(&format!("oci://{}/team/app:1", server.address));
    let blob = digest(&layer);
    read(&source, &blob, 0..1).await.unwrap();
    server.take_log();
    guarded.expired.store(true, Ordering::SeqCst);
    let answers = guarded.clone();
    server.now(move |seen| match seen.path() {
        "/token" => {
            std::thread::sleep(Duration::from_millis(500));
            Reply::new("503 Service Unavailable", "")
        }
        _ => answers.answer(seen),
    });
    let reads = (0..8_u64).map(|n| read(&source, &blob, n..n + 1));
    for found in join_all(reads).await {
        assert_eq!(found.unwrap_err().kind(), Kind::Unavailable);
    }
    let asked = targets(&server);
    let tokens = asked
        .iter()
        .filter(|target| target.starts_with("/token"))
        .count();
    assert!(tokens <= 2, "{asked:?}");
    let answers = guarded.clone();
    server.now(move |seen| answers.answer(seen));
    read(&source, &blob, 0..1).await.unwrap();
}

#[tokio::test]
async fn an_identity_token_is_exchanged_by_post() {
    let mut held = Held::default();
    let layer = data(100);
    held.blob(&layer);
    let guarded = Guarded::new(held, 300);
    let server = Scripted::start(move |seen| guarded.answer(seen)).await;
    let host = server.address.to_string();
    let entry = json!({ "auth": "dTo=", "identitytoken": format!("{SECRET}+&") });
    let settings = Settings::new().login(&host, entry);
    let source = settings.open(&format!("oci://{host}/team/app:1"));
    read(&source, &digest(&layer), 0..1).await.unwrap();
    let log = server.take_log();
    let asked = log.iter().find(|seen| seen.path() == "/token").unwrap();
    assert_eq!((&*asked.method, &*asked.target), ("POST", "/token"));
    assert_eq!(
        String::from_utf8_lossy(&asked.body),
        format!(
            "grant_type=refresh_token&client_id=hearth&scope=repository%3Ateam%2Fapp%3Apull\
             &refresh_token={SECRET}%2B%26&service=reg"
        )
    );
}

#[tokio::test]
async fn basic_credentials_and_what_refusals_say() {
    let mut held = Held::default();
    let layer = data(100);
    held.blob(&layer);
    let answers = held.clone();
    let server = Scripted::start(move |seen| match seen.header("authorization") {
        Some("Basic bWU6Z2VoZWlt") => answers.answer(seen),
        _ => Reply::new("401 Unauthorized\nwww-authenticate: Basic realm=\"x\"", ""),
    })
    .await;
    let host = server.address.to_string();
    let reference = format!("oci://{host}/team/app:1");
    let good = Settings::new().login(&host, json!({ "auth": "bWU6Z2VoZWlt" }));
    let source = good.open(&reference);
    for _ in 0..3 {
        read(&source, &digest(&layer), 0..1).await.unwrap();
    }
    assert_eq!(
        server.take_log().len(),
        4,
        "asked without credentials once only"
    );

    let wrong = Settings::new().login(
        &host,
        json!({ "username": "me", "password": format!("{SECRET}2") }),
    );
    let error = read(&wrong.open(&reference), &digest(&layer), 0..1)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    let text = shown(&error);
    assert!(
        text.contains("tried the credentials of") && text.contains("auth.json"),
        "{text}"
    );
    assert!(
        text.contains("docker login") && !text.contains(SECRET),
        "{text}"
    );

    let none = Settings::new();
    let error = layered(&none.open(&reference), &reference)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    let text = shown(&error);
    assert!(
        text.contains("no credentials for") && text.contains("auth.json"),
        "{text}"
    );

    // A token server that refuses, is elsewhere without https, or answers nonsense.
    for (answer, kind, word) in [
        ("401 Unauthorized", Kind::Denied, "tried the credentials of"),
        ("200 OK", Kind::Corrupt, "no token"),
        ("503 Service Unavailable", Kind::Unavailable, "503"),
    ] {
        let host = server.address.to_string();
        server.now(move |seen| match seen.path() {
            "/token" => Reply::new(answer, format!("{{\"token\": [\"{SECRET}\"]}}")),
            _ => Reply::new(
                &format!(
                    "401 Unauthorized\nwww-authenticate: Bearer realm=\"http://{host}/token\""
                ),
                "",
            ),
        });
        let error = layered(&good.open(&reference), &reference)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert!(!shown(&error).contains(SECRET));
    }
    // That the registry on this machine is asked without TLS is no leave to send passwords elsewhere so.
    server.now(|_| {
        let challenge = "www-authenticate: Bearer realm=\"http://auth.example/token\"";
        Reply::new(&format!("401 Unauthorized\n{challenge}"), "")
    });
    let error = layered(&good.open(&reference), &reference)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
    assert!(error.to_string().contains("without https"), "{error}");
}

/// Several pull secrets, as a pod may have: each is tried, whoever refuses it.
#[tokio::test]
async fn of_several_credentials_each_is_tried() {
    let mut held = Held::default();
    held.image("1", "amd64", &[data(100)]);
    let login = |user: &str| {
        let auth = format!("{user}:{SECRET}");
        format!(
            "Basic {}",
            base64::Engine::encode(&base64::engine::general_purpose::STANDARD, auth)
        )
    };
    for asks_for in ["a password", "a token", "a token that is not refused"] {
        let (held, good) = (held.clone(), login("good"));
        let logins: Vec<_> = ["one", "two", "good"].map(login).into();
        let server = Scripted::start(move |seen| {
            let (host, sent) = (seen.header("host").unwrap(), seen.header("authorization"));
            let token = |user: &str| format!("Bearer {SECRET}-{user}");
            let is_in = sent == Some(&good) || sent == Some(&token("2"));
            let number = logins.iter().position(|login| sent == Some(login));
            let challenge = match asks_for {
                "a password" => "Basic realm=\"r\"".to_owned(),
                _ => format!("Bearer realm=\"http://{host}/token\",service=\"reg\""),
            };
            match (seen.path(), number) {
                ("/token", Some(number)) if number == 2 || asks_for.ends_with("refused") => {
                    let body = json!({ "token": format!("{SECRET}-{number}") });
                    Reply::new("200 OK\ncontent-type: application/json", body.to_string())
                }
                ("/token", _) => Reply::new("401 Unauthorized", ""),
                _ if is_in => held.answer(seen),
                _ => Reply::new(
                    &format!("401 Unauthorized\nwww-authenticate: {challenge}"),
                    "",
                ),
            }
        })
        .await;
        let host = server.address.to_string();
        let reference = format!("oci://{host}/team/app:1");
        let open = |users: &[&str]| {
            let registries = users.iter().map(|user| {
                let file = json!({ "auths": { &host: { "username": user, "password": SECRET } } });
                Secret::new(file.to_string())
            });
            let keys = Keys {
                registries: registries.collect(),
                ..Keys::default()
            };
            let sources = Sources::new(Settings::new().config());
            let sources = sources.with_credentials(Credentials::new(keys));
            sources.open(&reference.parse().unwrap()).unwrap()
        };
        let source = open(&["one", "two", "good"]);
        layered(&source, &reference).await.unwrap();
        // It goes on with the one that was good.
        server.take_log();
        source.manifest("1").await.unwrap();
        assert_eq!(server.take_log().len(), 1, "{asks_for}");
        let error = layered(&open(&["one", "two"]), &reference).await;
        let error = error.unwrap_err();
        assert_eq!(error.kind(), Kind::Denied, "{asks_for}: {error}");
        assert!(server.take_log().len() <= 6, "{asks_for}");
    }
}
