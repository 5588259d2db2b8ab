//! A TCP relay in front of a daemon or a MongoDB. It can silence its connections, lose the answer
//! to a request, or deliver a request late. It forwards bytes and parses no protocol.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Forwards bytes in both directions until it is dropped.
pub(crate) struct Relay {
    address: SocketAddr,
    url: String,
    connections: Arc<AtomicUsize>,
    /// Connections with a number below this forward nothing.
    silent_below: watch::Sender<usize>,
    fault_is_over: CancellationToken,
    delivered: Mutex<oneshot::Receiver<()>>,
    _task: AbortOnDropHandle<()>,
}

/// A fault that affects one request, on whichever connection the request arrives.
struct Fault {
    /// Text that only the affected request contains.
    pattern: &'static str,
    kind: Kind,
    is_over: CancellationToken,
    delivered: oneshot::Sender<()>,
}

#[derive(Clone, Copy)]
enum Kind {
    /// The answer to the request is lost, and so is everything after it on the same connection.
    Unanswered,
    /// The request is delivered when [`Relay::deliver`] is called. Then its connection is closed,
    /// without the answer.
    Late,
}

impl Relay {
    /// Starts a relay to the server at `to` that forwards everything.
    pub(crate) async fn to(to: SocketAddr) -> Self {
        Self::start("", Kind::Unanswered, to).await
    }

    /// Starts a relay to the server at `to` that loses the answer to the first request that
    /// contains `pattern`, and everything after it on the same connection.
    pub(crate) async fn losing_the_answer_to(pattern: &'static str, to: SocketAddr) -> Self {
        Self::start(pattern, Kind::Unanswered, to).await
    }

    /// Starts a relay to the server at `to` that holds back the first request that contains
    /// `pattern`, until [`Self::deliver`] is called.
    pub(crate) async fn holding_back(pattern: &'static str, to: SocketAddr) -> Self {
        Self::start(pattern, Kind::Late, to).await
    }

    /// Starts a relay. If `pattern` is empty, it forwards everything.
    async fn start(pattern: &'static str, kind: Kind, to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (silent_below, silence) = watch::channel(0);
        let (connections, fault_is_over) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
        let (delivered, delivery) = oneshot::channel();
        let fault = Fault { pattern, kind, is_over: fault_is_over.clone(), delivered };
        let fault = Arc::new(Mutex::new(Some(fault).filter(|fault| !fault.pattern.is_empty())));
        let count = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = count.fetch_add(1, Ordering::Relaxed);
                let server = TcpStream::connect(to).await.unwrap();
                let (mut silence, fault) = (silence.clone(), Arc::clone(&fault));
                tokio::spawn(async move {
                    let mut ends = (client, server);
                    tokio::select! {
                        () = forward(&mut ends, &fault) => return,
                        _ = silence.wait_for(|below| number < *below) => {}
                    }
                    // Both connections stay open, and nothing is forwarded between them.
                    std::future::pending::<()>().await;
                });
            }
        });
        let (url, delivered) = (format!("http://{address}"), Mutex::new(delivery));
        let _task = AbortOnDropHandle::new(task);
        Self { address, url, connections, silent_below, fault_is_over, delivered, _task }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Returns how many connections were made to the relay so far.
    pub(crate) fn count(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Silences all connections that exist now, without closing them. Later connections work.
    pub(crate) fn silence(&self) {
        self.silent_below.send_replace(self.count());
    }

    /// Closes the connection on which the answer was lost.
    pub(crate) fn close_unanswered(&self) {
        self.fault_is_over.cancel();
    }

    /// Delivers the request that was held back, and waits until the server has answered it.
    pub(crate) async fn deliver(&self) {
        self.fault_is_over.cancel();
        (&mut *self.delivered.lock().await).await.expect("a request that was held back");
    }
}

async fn forward((client, server): &mut (TcpStream, TcpStream), fault: &Mutex<Option<Fault>>) {
    let (mut request_bytes, mut answer_bytes) = ([0; 16 * 1024], [0; 16 * 1024]);
    let mut unanswered: Option<Fault> = None;
    loop {
        let is_over = async {
            match &unanswered {
                Some(fault) => fault.is_over.cancelled().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            read = client.read(&mut request_bytes) => {
                let Ok(length @ 1..) = read else { return };
                let request = &request_bytes[..length];
                let matches = |pattern: &str| request.windows(pattern.len()).any(|part| part == pattern.as_bytes());
                let matched = fault.lock().await.take_if(|fault| matches(fault.pattern));
                if let Some(Fault { kind: Kind::Late, is_over, .. }) = &matched {
                    is_over.cancelled().await;
                }
                if server.write_all(request).await.is_err() {
                    return;
                }
                match matched {
                    Some(Fault { kind: Kind::Late, delivered, .. }) => {
                        // The answer is dropped, since the client may have hung up by now.
                        if matches!(server.read(&mut answer_bytes).await, Ok(1..)) {
                            let _ = delivered.send(());
                        }
                        return;
                    }
                    Some(lost) => unanswered = Some(lost),
                    None => {}
                }
            }
            read = server.read(&mut answer_bytes) => {
                let Ok(length @ 1..) = read else { return };
                if unanswered.is_none() && client.write_all(&answer_bytes[..length]).await.is_err() {
                    return;
                }
            }
            () = is_over => return,
        }
    }
}
