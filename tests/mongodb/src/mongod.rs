//! One `mongod`: a replica set of one node, or a standalone server.

use anyhow::Result;
use mongodb::bson::Document;

use crate::node::{Kind, Node, SET, is_primary};

/// A running server. Dropping this value ends the server and removes its data.
#[derive(Debug)]
pub struct Mongod {
    node: Node,
    uri: String,
}

impl Mongod {
    /// Starts a replica set of one node on a free port of this host, and returns when it accepts
    /// writes.
    ///
    /// # Errors
    /// If there is no `mongod`, with advice; or if the server does not start, with the end of its
    /// log.
    pub async fn start() -> Result<Self> {
        Self::start_with(&[]).await
    }

    /// Starts a server with additional arguments for `mongod`. The server must still accept
    /// connections without TLS and without a password.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_with(arguments: &[&str]) -> Result<Self> {
        let node = Node::launch_with(Kind::Member, arguments).await?;
        node.initiate(&[node.port()], Document::new()).await?;
        node.until("a primary", is_primary).await?;
        let uri = format!("mongodb://127.0.0.1:{}/?replicaSet={SET}", node.port());
        Ok(Self { node, uri })
    }

    /// Starts a server without a replica set.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn standalone() -> Result<Self> {
        let node = Node::launch(Kind::Standalone).await?;
        let uri = format!("mongodb://127.0.0.1:{}/", node.port());
        Ok(Self { node, uri })
    }

    /// Returns the connection string.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Returns the port on 127.0.0.1, which stays the same over restarts.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.node.port()
    }

    /// Returns the id of the server's process, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.node.pid()
    }

    /// Suspends the process with SIGSTOP. Its connections stay open, and it answers no command.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn pause(&self) -> Result<()> {
        self.node.pause()
    }

    /// Continues a paused process.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn resume(&self) -> Result<()> {
        self.node.resume()
    }

    /// Kills the process, and keeps the data for [`Self::restart`].
    ///
    /// # Errors
    /// If the server's guardian has been killed.
    pub fn kill(&mut self) -> Result<()> {
        self.node.kill()
    }

    /// Starts the server again with the same port and data, and returns when it accepts writes.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn restart(&mut self) -> Result<()> {
        self.node.restart().await?;
        self.node.until("a primary", is_primary).await
    }

    /// Ends the server, and returns when its data is removed.
    ///
    /// # Errors
    /// If the data could not be removed.
    pub async fn stop(self) -> Result<()> {
        self.node.stop().await
    }
}
