//! A TCP relay in front of a daemon or a MongoDB. It can silence its connections, lose the answer
//! to a request, or deliver a request late. It does not know what a lease is.

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
    /// Connections with a lower number than this are silent.
    silent_below: watch::Sender<usize>,
    trick_is_over: CancellationToken,
    delivered: Mutex<oneshot::Receiver<()>>,
    _task: AbortOnDropHandle<()>,
}

/// What the relay does to one request, whichever connection brings that request.
struct Trick {
    /// Text that only the affected request contains.
    words: &'static str,
    kind: Kind,
    is_over: CancellationToken,
    delivered: oneshot::Sender<()>,
}

#[derive(Clone, Copy)]
enum Kind {
    /// The answer to the request is lost, and so is everything after it on the same connection.
    Unanswered,
    /// The request is delivered when the test says so. Nothing passes on its connection afterwards.
    Late,
}

impl Relay {
    /// Starts a relay to the server at `to` that forwards everything.
    pub(crate) async fn to(to: SocketAddr) -> Self {
        Self::start("", Kind::Unanswered, to).await
    }

    /// Starts a relay to the server at `to` that loses the answer to the first request that
    /// contains `words`, and everything after it on the same connection.
    pub(crate) async fn losing_the_answer_to(words: &'static str, to: SocketAddr) -> Self {
        Self::start(words, Kind::Unanswered, to).await
    }

    /// Starts a relay to the server at `to` that holds back the first request that contains
    /// `words`, until [`Self::deliver`] is called.
    pub(crate) async fn holding_back(words: &'static str, to: SocketAddr) -> Self {
        Self::start(words, Kind::Late, to).await
    }

    /// Starts a relay. If `words` is empty, it forwards everything.
    async fn start(words: &'static str, kind: Kind, to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (silent_below, silence) = watch::channel(0);
        let (connections, trick_is_over) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
        let (delivered, delivery) = oneshot::channel();
        let trick = Trick { words, kind, is_over: trick_is_over.clone(), delivered };
        let trick = Arc::new(Mutex::new(Some(trick).filter(|trick| !trick.words.is_empty())));
        let count = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = count.fetch_add(1, Ordering::Relaxed);
                let server = TcpStream::connect(to).await.unwrap();
                let (mut silence, trick) = (silence.clone(), Arc::clone(&trick));
                tokio::spawn(async move {
                    let mut ends = (client, server);
                    tokio::select! {
                        () = pass(&mut ends, &trick) => return,
                        _ = silence.wait_for(|below| number < *below) => {}
                    }
                    // Both connections stay open, and nothing passes between them.
                    std::future::pending::<()>().await;
                });
            }
        });
        let (url, delivered) = (format!("http://{address}"), Mutex::new(delivery));
        let _task = AbortOnDropHandle::new(task);
        Self { address, url, connections, silent_below, trick_is_over, delivered, _task }
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
    pub(crate) fn hush(&self) {
        self.silent_below.send_replace(self.count());
    }

    /// Closes the connection on which the answer was lost.
    pub(crate) fn break_off(&self) {
        self.trick_is_over.cancel();
    }

    /// Delivers the request that was held back, and waits until the server has answered it.
    pub(crate) async fn deliver(&self) {
        self.trick_is_over.cancel();
        (&mut *self.delivered.lock().await).await.expect("a request that was held back");
    }
}

async fn pass((client, server): &mut (TcpStream, TcpStream), trick: &Mutex<Option<Trick>>) {
    let (mut asked, mut answered) = ([0; 16 * 1024], [0; 16 * 1024]);
    let mut unanswered: Option<Trick> = None;
    loop {
        let is_over = async {
            match &unanswered {
                Some(trick) => trick.is_over.cancelled().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            read = client.read(&mut asked) => {
                let Ok(length @ 1..) = read else { return };
                let request = &asked[..length];
                let matches = |words: &str| request.windows(words.len()).any(|part| part == words.as_bytes());
                let matched = trick.lock().await.take_if(|trick| matches(trick.words));
                if let Some(Trick { kind: Kind::Late, is_over, .. }) = &matched {
                    is_over.cancelled().await;
                }
                if server.write_all(request).await.is_err() {
                    return;
                }
                match matched {
                    Some(Trick { kind: Kind::Late, delivered, .. }) => {
                        // The answer is dropped, since the client may have hung up by now.
                        if matches!(server.read(&mut answered).await, Ok(1..)) {
                            let _ = delivered.send(());
                        }
                        return;
                    }
                    Some(lost) => unanswered = Some(lost),
                    None => {}
                }
            }
            read = server.read(&mut answered) => {
                let Ok(length @ 1..) = read else { return };
                if unanswered.is_none() && client.write_all(&answered[..length]).await.is_err() {
                    return;
                }
            }
            () = is_over => return,
        }
    }
}
