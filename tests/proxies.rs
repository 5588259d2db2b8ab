//! leased behind proxies, with the configurations of docs/proxies.md. The tests change only ports
//! and folders.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use leased_client::v1::keep_alive_result::Outcome;
use leased_client::v1::lease_service_client::LeaseServiceClient;
use rstest::rstest;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::sleep;
use tonic::transport::Endpoint;
use uuid::Uuid;

use crate::keepalive::KeepAlive;
use crate::support::{
    AcquireBuilder, Calls, Daemon, Embedded, Leases, acquire, eventually, named, secs, tools, until_queued,
};

#[derive(Debug, Clone, Copy)]
enum Proxy {
    Nginx,
    Haproxy,
    Envoy,
}

use Proxy::{Envoy, Haproxy, Nginx};

impl Proxy {
    /// Returns the language with which the page marks the configuration of this proxy.
    fn language(self) -> &'static str {
        match self {
            Nginx => "nginx",
            Haproxy => "haproxy",
            Envoy => "yaml",
        }
    }

    /// Returns the command that runs the proxy in the foreground with this configuration.
    fn command(self, folder: &Path, config: &Path) -> Command {
        let program = match self {
            Nginx => tools::debian("nginx", &["nginx"], "usr/sbin/nginx"),
            Haproxy => tools::debian(
                "haproxy",
                &["haproxy", "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1"],
                "usr/sbin/haproxy",
            ),
            Envoy => tools::envoy(),
        };
        let mut command = program.unwrap();
        match self {
            // By default nginx puts its pid file and its logs into system folders.
            Nginx => command
                .arg("-p")
                .arg(folder)
                .args(["-g", "daemon off; pid nginx.pid; error_log stderr;"])
                .arg("-c"),
            Haproxy => command.args(["-db", "-f"]),
            Envoy => {
                command.args(["--disable-hot-restart", "--concurrency", "1", "--log-level", "error", "-c"])
            }
        };
        command.arg(config).current_dir(folder).stdin(Stdio::null());
        command
    }
}

/// A proxy process, which ends when this value is dropped.
struct Running {
    child: Child,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Running {
    /// Starts the proxy in front of `daemon`, with the configuration of the page. Only ports and
    /// folders are changed.
    async fn start(proxy: Proxy, daemon: &Daemon) -> Self {
        let page = std::fs::read_to_string(tools::root().join("docs/proxies.md")).unwrap();
        let block = page
            .split(&format!("```{}\n", proxy.language()))
            .nth(1)
            .expect("the page has no configuration for it");
        let config = block.split("```").next().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let config =
            config.replace("5330", &free.port().to_string()).replace("5327", &daemon.grpc.port().to_string());
        // By default nginx writes its access log and temporary files into system folders.
        let own = "access_log off; client_body_temp_path t; proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;";
        let config = config.replace("http {", &format!("http {{ {own}"));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("proxy.yaml");
        std::fs::write(&file, config).unwrap();
        let path = folder.path().to_owned();
        let child = spawn_blocking(move || proxy.command(&path, &file).spawn().unwrap()).await.unwrap();
        let running = Self { child, address: free, _folder: folder };
        eventually(async || TcpStream::connect(free).await.ok()).await;
        running
    }

    async fn client(&self) -> Leases {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        LeaseServiceClient::new(endpoint.connect().await.unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(Command::new("kill").arg(self.child.id().to_string()).status());
        drop(self.child.wait());
    }
}

/// The proxies run at the same time, since each test mostly waits.
#[tokio::test]
async fn a_long_wait_and_a_long_stream_pass_each_proxy() {
    tokio::join!(assert_passes(Nginx), assert_passes(Haproxy), assert_passes(Envoy));
}

/// The test makes more calls than nginx (512 connections) and envoy (1,024 calls) allow by default.
#[rstest]
#[case::nginx(Nginx, 3)]
#[case::haproxy(Haproxy, 6)]
#[case::envoy(Envoy, 6)]
#[tokio::test]
async fn many_calls_that_wait_pass_each_proxy(#[case] proxy: Proxy, #[case] connections: usize) {
    const CALLS: usize = 200;
    let daemon = Daemon::start(Embedded).await;
    let running = Running::start(proxy, &daemon).await;
    let mut direct = daemon.client().await;
    let mut waiting = JoinSet::new();
    for number in 0..connections {
        let key = format!("job/{number}");
        direct.get_lease(acquire(&key).ttl(secs(600))).await.unwrap();
        let client = running.client().await;
        for _ in 0..CALLS {
            let (mut client, asked) = (client.clone(), acquire(&key).wait(secs(600)));
            waiting.spawn(async move { client.get_lease(asked).await });
        }
        tokio::select! {
            () = until_queued(&mut direct, &key, CALLS) => {}
            Some(ended) = waiting.join_next() => panic!("{:?}", ended.unwrap()),
        }
    }
}

/// Checks that a call may wait through the proxy for longer than a minute, after which nginx gives
/// up by default. Meanwhile a stream that has transferred more than 1 MB stays silent.
async fn assert_passes(proxy: Proxy) {
    let daemon = Daemon::start(Embedded).await;
    let running = Running::start(proxy, &daemon).await;
    let mut client = running.client().await;
    let key = "k".repeat(500);
    let held = client.get_lease(acquire(&key).ttl(secs(600))).await.unwrap().lease.unwrap();

    let mut stream = KeepAlive::open(&mut client).await;
    let lease = std::slice::from_ref(&held);
    // The lease is named 100 times only to make the message large.
    let large: Vec<_> = std::iter::repeat_n(held.clone(), 100).collect();
    for _ in 0..25 {
        let touched = stream.touch(&large).await;
        assert!(touched.iter().all(|(_, outcome)| matches!(outcome, Outcome::Kept(_))));
    }

    let mut waiting = running.client().await;
    let (id, asked) = (Uuid::new_v4(), acquire(&key).wait(secs(600)));
    let wait = tokio::spawn(async move { waiting.get_lease(asked.id(id)).await });
    until_queued(&mut client, &key, 1).await;
    // The sleep is the test itself: no message passes the proxy for 62 s.
    sleep(secs(62)).await;
    assert_eq!(stream.touch(lease).await.len(), 1, "the stream goes on");
    client.give_back(&held).await.unwrap();
    let granted = wait.await.unwrap().unwrap();
    assert_eq!(granted.lease, Some(named(&key, id)));
}
