//! leased behind proxies, with the configurations that docs/proxies.md shows but for ports and folders.

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
use crate::support::{Asking, Calls, Daemon, Embedded, Leases, ask, eventually, line_of, named, secs, tools};

#[derive(Debug, Clone, Copy)]
enum Proxy {
    Nginx,
    Haproxy,
    Envoy,
}

use Proxy::{Envoy, Haproxy, Nginx};

impl Proxy {
    /// How the page marks its configuration.
    fn language(self) -> &'static str {
        match self {
            Nginx => "nginx",
            Haproxy => "haproxy",
            Envoy => "yaml",
        }
    }

    /// Its program, with this configuration, in the foreground.
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
            // Its pages of errors and its logs would be in folders of the system.
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

/// A proxy as a process, which ends with the test.
struct Running {
    child: Child,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Running {
    /// Before the daemon, with the configuration of the page but for ports and folders.
    async fn start(proxy: Proxy, daemon: &Daemon) -> Self {
        let page = std::fs::read_to_string(tools::root().join("docs/proxies.md")).unwrap();
        let block =
            page.split(&format!("```{}\n", proxy.language())).nth(1).expect("a configuration on the page");
        let config = block.split("```").next().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let config =
            config.replace("5330", &free.port().to_string()).replace("5327", &daemon.grpc.port().to_string());
        // nginx wants its logs somewhere, and temporary files of its own.
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

/// All at once, for most of the time is spent waiting.
#[tokio::test]
async fn a_long_wait_and_a_long_stream_pass_each_proxy() {
    tokio::join!(passes(Nginx), passes(Haproxy), passes(Envoy));
}

/// More than nginx and envoy let through by default: 512 connections and 1,024 calls.
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
        direct.get_lease(ask(&key).ttl(secs(600))).await.unwrap();
        let client = running.client().await;
        for _ in 0..CALLS {
            let (mut client, asked) = (client.clone(), ask(&key).wait(secs(600)));
            waiting.spawn(async move { client.get_lease(asked).await });
        }
        tokio::select! {
            () = line_of(&mut direct, &key, CALLS) => {}
            Some(ended) = waiting.join_next() => panic!("{:?}", ended.unwrap()),
        }
    }
}

/// A wait longer than the minute after which nginx gives up by default, and a stream of more than a megabyte that then says
/// nothing for as long.
async fn passes(proxy: Proxy) {
    let daemon = Daemon::start(Embedded).await;
    let running = Running::start(proxy, &daemon).await;
    let mut client = running.client().await;
    let key = "k".repeat(500);
    let held = client.get_lease(ask(&key).ttl(secs(600))).await.unwrap().lease.unwrap();

    let mut stream = KeepAlive::open(&mut client).await;
    let lease = std::slice::from_ref(&held);
    // Naming a lease more than once changes nothing but the size of the message.
    let large: Vec<_> = std::iter::repeat_n(held.clone(), 100).collect();
    for _ in 0..25 {
        let touched = stream.touch(&large).await;
        assert!(touched.iter().all(|(_, outcome)| matches!(outcome, Outcome::Kept(_))));
    }

    let mut waiting = running.client().await;
    let (id, asked) = (Uuid::new_v4(), ask(&key).wait(secs(600)));
    let wait = tokio::spawn(async move { waiting.get_lease(asked.id(id)).await });
    line_of(&mut client, &key, 1).await;
    // What is tried is that nothing happens for so long.
    sleep(secs(62)).await;
    assert_eq!(stream.touch(lease).await.len(), 1, "the stream goes on");
    client.give_back(&held).await.unwrap();
    let granted = wait.await.unwrap().unwrap();
    assert_eq!(granted.lease, Some(named(&key, id)));
}
