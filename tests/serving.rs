//! The health service, readiness, reflection, and drain.

use futures_util::StreamExt;
use leased_client::Reason;
use mongodb::bson::doc;
use rstest::rstest;
use throwaway_mongodb::Mongod;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use uuid::Uuid;

use crate::keepalive::{KeepAlive, kept};
use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, MongoDb, acquire, eventually, http, refusal, secs,
    until_queued,
};

#[rstest]
#[tokio::test]
async fn a_daemon_whose_store_answers_is_serving_and_ready(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut health = HealthClient::new(daemon.channel().await);
    for service in ["", "leased.v1.LeaseService", "leased.v1.AdminService"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        eventually(async || {
            let answer = health.check(request.clone()).await.ok()?.into_inner();
            (answer.status() == ServingStatus::Serving).then_some(())
        })
        .await;
    }
    let ready =
        eventually(async || http(daemon.http, "/readyz").await.filter(|answer| answer.0.contains("200")))
            .await;
    assert!(ready.1.starts_with("ready\nstore="), "{}", ready.1);
    assert!(http(daemon.http, "/livez").await.unwrap().0.contains("200"));
}

#[tokio::test]
async fn with_a_second_daemon_readiness_shows_the_lag_of_the_change_feed() {
    let daemon = Daemon::start(MongoDb).await;
    let other = daemon.sibling().await;
    for daemon in [&daemon, &other] {
        let said = eventually(async || {
            let (head, said) = http(daemon.http, "/readyz").await?;
            let said = said.lines().next()?.to_owned();
            (head.contains("200") && said != "ready").then_some(said)
        });
        let said = said.await;
        let behind = said.strip_prefix("ready, change feed ").and_then(|said| said.strip_suffix("ms behind"));
        assert!(behind.is_some_and(|behind| behind.parse::<u32>().is_ok()), "{said:?}");
    }
}

/// The test starts its own MongoDB, since fail points affect the whole server.
#[tokio::test]
async fn a_daemon_whose_change_feed_is_broken_is_ready_and_reports_it() {
    let mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |_| {}).await;
    let _other = daemon.sibling().await;
    // The change feed fails with ChangeStreamHistoryLost (286).
    let data = doc! { "failCommands": ["aggregate", "getMore"], "errorCode": 286 };
    let fail = doc! { "configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data };
    let client = mongodb::Client::with_uri_str(mongod.uri()).await.unwrap();
    client.database("admin").run_command(fail).await.unwrap();
    eventually(async || {
        let (head, said) = http(daemon.http, "/readyz").await?;
        (head.contains("200") && said.starts_with("ready, change feed broken")).then_some(())
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn reflection_shows_the_api_in_both_versions(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    {
        use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
        use tonic_reflection::pb::v1::{
            ServerReflectionRequest, server_reflection_request::MessageRequest,
            server_reflection_response::MessageResponse,
        };
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut client = ServerReflectionClient::new(daemon.channel().await);
        let answers =
            client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
        let answer = answers.collect::<Vec<_>>().await.remove(0).unwrap();
        let Some(MessageResponse::ListServicesResponse(services)) = answer.message_response else {
            panic!("{answer:?}")
        };
        let names: Vec<_> = services.service.into_iter().map(|service| service.name).collect();
        assert!(names.contains(&"leased.v1.LeaseService".to_owned()), "{names:?}");
        assert!(names.contains(&"grpc.health.v1.Health".to_owned()), "{names:?}");
    }
    {
        use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient;
        use tonic_reflection::pb::v1alpha::{
            ServerReflectionRequest, server_reflection_request::MessageRequest,
            server_reflection_response::MessageResponse,
        };
        let symbol = "leased.v1.AdminService".to_owned();
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::FileContainingSymbol(symbol)),
        };
        let mut client = ServerReflectionClient::new(daemon.channel().await);
        let answers =
            client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
        let answer = answers.collect::<Vec<_>>().await.remove(0).unwrap();
        assert!(
            matches!(answer.message_response, Some(MessageResponse::FileDescriptorResponse(_))),
            "{answer:?}"
        );
    }
}

#[tokio::test]
async fn a_drain_ends_all_calls_with_the_reason_shutting_down() {
    let daemon = Daemon::start(MongoDb).await;
    let other = daemon.sibling().await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let mut stream = KeepAlive::open(&mut client).await;
    kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
    let mut health = HealthClient::new(daemon.channel().await);
    let mut statuses = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let (mut with_id, mut without_id) = (client.clone(), client.clone());
    let chosen =
        tokio::spawn(
            async move { with_id.get_lease(acquire("job").id(Uuid::new_v4()).wait(secs(60))).await },
        );
    let picked = tokio::spawn(async move { without_id.get_lease(acquire("job").wait(secs(60))).await });
    until_queued(&mut client, "job", 2).await;

    daemon.drain();
    let status = stream.next().await.unwrap_err();
    assert_eq!((status.code(), refusal(&status, "").0), (Code::Unavailable, Some(Reason::ShuttingDown)));
    for waiting in [chosen, picked] {
        let status = waiting.await.unwrap().unwrap_err();
        assert_eq!(refusal(&status, "").0, Some(Reason::ShuttingDown), "{status:?}");
    }
    let told = async {
        while let Some(Ok(answer)) = statuses.next().await {
            if answer.status() == ServingStatus::NotServing {
                return true;
            }
        }
        false
    };
    assert!(told.await, "watchers of the health service are not told");
    let started = tokio::time::Instant::now();
    daemon.stop().await;
    assert!(
        started.elapsed() < secs(8),
        "the drain waits, although no call is left: {:?}",
        started.elapsed()
    );

    // The lease is kept alive at the other daemon, with the same id.
    let mut client = other.client().await;
    let mut stream = KeepAlive::open(&mut client).await;
    kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
    // The waiter whose caller chose the lease id keeps its position. The other waiter is removed,
    // since no caller knows its id.
    assert_eq!(client.inspect("job").await.unwrap().waiters.len(), 1);
}

/// A peer that never sends a call must not delay the end of the daemon.
#[rstest]
#[tokio::test]
async fn a_drain_has_a_time_limit(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start_with(backend, |config| config.drain_timeout = secs(1)).await;
    let address = daemon.grpc;
    let _silent = TcpStream::connect(address).await.unwrap();
    let mut halfway = TcpStream::connect(address).await.unwrap();
    halfway.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
    daemon.stop().await;
}
