//! The load generator's own client: gRPC calls over HTTP/2 and nothing around them.
//!
//! The load generator shares the processors with the servers, and tonic's stubs and channels would
//! take too much of them. All contenders with a gRPC API are called by this client, so that the
//! load costs the same for each.

use std::future::poll_fn;
use std::marker::PhantomData;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, TE};
use http::uri::PathAndQuery;
use http::{Method, Request, StatusCode, Uri, Version};
use prost::Message;
use tokio::net::TcpStream;
use tonic::Status;

use crate::framing::{Received, encode};

/// The flow-control window of a stream: enough for any answer, so that none is delayed.
const STREAM_WINDOW: u32 = 2 << 20;
/// The flow-control window of a connection: enough for the answers on all its streams.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// The limit on concurrent streams until the server has sent its own.
const FIRST_STREAMS: usize = 100;

/// A connection to a gRPC server. Clones share the connection.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    requests: SendRequest<Bytes>,
    origin: Uri,
    headers: HeaderMap,
}

impl Client {
    /// Connects to `address`, as in `http://127.0.0.1:1`.
    pub(crate) async fn connect(address: &str) -> Result<Self> {
        let origin: Uri = address.parse()?;
        let stream = TcpStream::connect(origin.authority().context("an address")?.as_str()).await?;
        stream.set_nodelay(true)?;
        let mut builder = Builder::new();
        builder
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_max_send_streams(FIRST_STREAMS)
            .enable_push(false);
        let (requests, connection) = builder.handshake(stream).await?;
        // The task ends with the last clone and the last stream. When the connection is lost, all
        // of them get an error.
        tokio::spawn(connection);
        let mut headers = HeaderMap::with_capacity(2);
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        Ok(Self { requests, origin, headers })
    }

    /// Makes a call with one message each way.
    pub(crate) async fn call<Q, A>(&mut self, path: &'static str, request: Q) -> Result<A>
    where
        Q: Message,
        A: Message + Default,
    {
        let message = encode([request])?;
        let (mut messages, mut answers) = self.open(path).await?;
        messages.send_data(message, true)?;
        let answer = answers.next().await?.context("a call ended without an answer")?;
        ensure!(answers.next::<A>().await?.is_none(), "more than one answer to a call");
        Ok(answer)
    }

    /// Opens a stream. Does not wait for the response head, because some servers send it only with
    /// their first answer.
    pub(crate) async fn stream<Q, A>(&mut self, path: &'static str) -> Result<Stream<Q, A>> {
        let (messages, answers) = self.open(path).await?;
        Ok(Stream { messages, answers, types: PhantomData })
    }

    /// Sends the head of a request, once the server allows one more stream. Data that the caller
    /// sends before its next await is part of the same write.
    async fn open(&mut self, path: &'static str) -> Result<(SendStream<Bytes>, Answers)> {
        poll_fn(|context| self.requests.poll_ready(context)).await.context("the connection is lost")?;
        let mut parts = self.origin.clone().into_parts();
        parts.path_and_query = Some(PathAndQuery::from_static(path));
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = Uri::from_parts(parts)?;
        *request.version_mut() = Version::HTTP_2;
        *request.headers_mut() = self.headers.clone();
        let (response, messages) = self.requests.send_request(request, false)?;
        Ok((messages, Answers::Awaited(response)))
    }
}

/// A bidirectional stream. Dropping this value resets the stream at the server.
#[derive(Debug)]
pub(crate) struct Stream<Q, A> {
    messages: SendStream<Bytes>,
    answers: Answers,
    types: PhantomData<fn(Q) -> A>,
}

impl<Q: Message, A: Message + Default> Stream<Q, A> {
    /// Sends messages in one piece, without waiting. h2 keeps what the flow-control window does not
    /// allow yet, and sends it later.
    pub(crate) fn send(&mut self, messages: impl IntoIterator<Item = Q>) -> Result<()> {
        // An error means that the stream has ended. The next read of an answer says why.
        let _ = self.messages.send_data(encode(messages)?, false);
        Ok(())
    }

    /// Reads the next answer. Fails once the stream has ended.
    pub(crate) async fn next(&mut self) -> Result<A> {
        self.answers.next().await?.context("the stream has ended")
    }
}

/// The answers to a call or a stream.
#[derive(Debug)]
enum Answers {
    Awaited(ResponseFuture),
    Begun { body: RecvStream, received: Received },
}

impl Answers {
    /// Reads the next message. Returns `None` once the call has ended successfully.
    async fn next<A: Message + Default>(&mut self) -> Result<Option<A>> {
        loop {
            match self {
                Self::Awaited(response) => {
                    let (head, body) = response.await?.into_parts();
                    let ended = body.is_end_stream();
                    *self = Self::Begun { body, received: Received::default() };
                    ensure!(
                        head.status == StatusCode::OK,
                        "the server answers with HTTP status {}",
                        head.status
                    );
                    if ended {
                        // Without a body, the head holds the trailers.
                        check_status(&head.headers)?;
                        return Ok(None);
                    }
                }
                Self::Begun { body, received } => {
                    if let Some(message) = received.next()? {
                        return Ok(Some(message));
                    }
                    if let Some(data) = body.data().await.transpose()? {
                        body.flow_control().release_capacity(data.len())?;
                        received.push(data);
                    } else {
                        check_status(&body.trailers().await?.unwrap_or_default())?;
                        ensure!(received.is_empty(), "a call ended within a message");
                        return Ok(None);
                    }
                }
            }
        }
    }
}

/// Fails if the trailers say that the call has failed.
fn check_status(trailers: &HeaderMap) -> Result<()> {
    // Nearly all calls succeed, and this is cheaper than building a `Status`.
    if trailers.get("grpc-status").is_some_and(|code| code == "0") {
        return Ok(());
    }
    Err(Status::from_header_map(trailers).context("a call ended without a status")?.into())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use h2::server::{Connection, SendResponse};
    use http::Response;
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    /// A request as a server receives it.
    type Asked = (Request<RecvStream>, SendResponse<Bytes>);

    /// A client, and the other end of its connection.
    async fn connected(streams: u32) -> (Client, Connection<TcpStream, Bytes>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let accept = async {
            let (stream, _) = listener.accept().await.expect("a connection");
            let mut builder = h2::server::Builder::new();
            builder.max_concurrent_streams(streams).handshake(stream).await.expect("HTTP/2")
        };
        let (client, server) = tokio::join!(Client::connect(&address), accept);
        (client.expect("a connection"), server)
    }

    async fn asked(server: &mut Connection<TcpStream, Bytes>) -> Asked {
        server.accept().await.expect("a request").expect("well formed")
    }

    /// The trailers of a call that ended with `code`.
    fn ended(code: &'static str) -> HeaderMap {
        HeaderMap::from_iter([("grpc-status".parse().expect("a name"), HeaderValue::from_static(code))])
    }

    /// Answers with these pieces of bytes, and then with the trailers.
    fn answer(mut asked: Asked, pieces: impl IntoIterator<Item = Bytes>) {
        let mut body = asked.1.send_response(Response::new(()), false).expect("an open stream");
        for piece in pieces {
            body.send_data(piece, false).expect("an open stream");
        }
        body.send_trailers(ended("0")).expect("an open stream");
    }

    /// Drives the connection for as long as the work takes.
    async fn beside<T>(mut server: Connection<TcpStream, Bytes>, work: impl Future<Output = T>) -> T {
        let connection = tokio::spawn(async move { poll_fn(|context| server.poll_closed(context)).await });
        let done = timeout(Duration::from_secs(30), work).await.expect("no hang");
        connection.abort();
        done
    }

    #[tokio::test]
    async fn a_call_is_answered() {
        let (mut client, mut server) = connected(9).await;
        let question = "?".repeat(300_000);
        let call = tokio::spawn({
            let question = question.clone();
            async move { client.call::<String, String>("/a/b", question).await }
        });
        let mut asked = asked(&mut server).await;
        assert_eq!(asked.0.uri().path(), "/a/b");
        assert_eq!(asked.0.method(), Method::POST);
        assert_eq!(asked.0.headers()[TE], "trailers");
        assert_eq!(asked.0.headers()[CONTENT_TYPE], "application/grpc");
        let work = async {
            let mut received = Received::default();
            while let Some(data) = asked.0.body_mut().data().await {
                let data = data.expect("data");
                asked.0.body_mut().flow_control().release_capacity(data.len()).expect("received");
                received.push(data);
            }
            // More than either flow-control window, so the client must extend both.
            assert_eq!(received.next::<String>().expect("well formed"), Some(question));
            let long = encode(["!".repeat(20_000_000)]).expect("short enough");
            let pieces: Vec<Bytes> = long.chunks(7_000_000).map(|piece| long.slice_ref(piece)).collect();
            answer(asked, pieces);
            call.await.expect("no panic")
        };
        assert_eq!(beside(server, work).await.expect("an answer").len(), 20_000_000);
    }

    #[tokio::test]
    async fn a_refusal_without_a_body_says_why() {
        let (mut client, mut server) = connected(9).await;
        let call = tokio::spawn(async move { client.call::<String, String>("/a/b", String::new()).await });
        let (_, mut respond) = asked(&mut server).await;
        let mut head = Response::new(());
        *head.headers_mut() = ended("8");
        head.headers_mut().insert("grpc-message", HeaderValue::from_static("100%25 full"));
        respond.send_response(head, true).expect("an open stream");
        let error = beside(server, call).await.expect("no panic").expect_err("a refusal");
        let status = error.downcast_ref::<Status>().expect("a status");
        assert_eq!((status.code(), status.message()), (tonic::Code::ResourceExhausted, "100% full"));
    }

    #[tokio::test]
    async fn a_call_without_a_whole_answer_fails() {
        let half = encode(["answer".to_owned()]).expect("short").slice(..8);
        for pieces in [vec![], vec![half]] {
            let (mut client, mut server) = connected(9).await;
            let call =
                tokio::spawn(async move { client.call::<String, String>("/a/b", String::new()).await });
            answer(asked(&mut server).await, pieces);
            beside(server, call).await.expect("no panic").expect_err("no answer");
        }
    }

    #[tokio::test]
    async fn calls_beyond_the_limit_of_streams_wait() {
        let (client, mut server) = connected(2).await;
        let mut calls = tokio::task::JoinSet::new();
        for number in 0..20 {
            let mut client = client.clone();
            calls.spawn(async move {
                for turn in 0..5 {
                    let question = format!("{number} {turn}");
                    let answer: String = client.call("/a/b", question.clone()).await.expect("an answer");
                    assert_eq!(answer, question);
                }
            });
        }
        let serve = async {
            while let Some(Ok(mut asked)) = server.accept().await {
                tokio::spawn(async move {
                    let mut received = Received::default();
                    while let Some(data) = asked.0.body_mut().data().await {
                        received.push(data.expect("data"));
                    }
                    let question: String = received.next().expect("well formed").expect("a message");
                    answer(asked, [encode([question]).expect("short")]);
                });
            }
        };
        tokio::select! {
            () = serve => panic!("the connection is closed"),
            called = timeout(Duration::from_secs(30), calls.join_all()) => drop(called.expect("no hang")),
        }
    }

    #[tokio::test]
    async fn a_stream_is_bidirectional_and_is_reset_when_dropped() {
        let (mut client, mut server) = connected(9).await;
        let mut stream = client.stream::<String, String>("/a/b").await.expect("a stream");
        stream.send(["one".to_owned(), "two".to_owned()]).expect("short");
        let (mut request, mut respond) = asked(&mut server).await;
        let work = async {
            let mut received = Received::default();
            received.push(request.body_mut().data().await.expect("data").expect("data"));
            let mut body = respond.send_response(Response::new(()), false).expect("an open stream");
            for sent in ["one", "two"] {
                let message: String = received.next().expect("well formed").expect("a message");
                assert_eq!(message, sent);
                body.send_data(encode([message]).expect("short"), false).expect("an open stream");
                assert_eq!(stream.next().await.expect("an answer"), sent);
            }
            drop(stream);
            let reset = request.body_mut().data().await.expect("an end").expect_err("a reset");
            assert_eq!(reset.reason(), Some(h2::Reason::CANCEL));
        };
        beside(server, work).await;
    }

    #[tokio::test]
    async fn all_calls_and_streams_fail_when_the_connection_is_lost() {
        let (mut client, mut server) = connected(9).await;
        let mut stream = client.stream::<String, String>("/a/b").await.expect("a stream");
        let asked = asked(&mut server).await;
        drop(server);
        let lost = async {
            stream.next().await.expect_err("a lost connection");
            stream.send([String::new()]).expect("short");
            stream.next().await.expect_err("a lost connection");
            client.call::<String, String>("/a/b", String::new()).await.expect_err("a lost connection");
        };
        timeout(Duration::from_secs(30), lost).await.expect("no hang");
        drop(asked);
    }
}
