//! One `mongod`, as a replica set of its own or as the standalone server that it would be without.

use anyhow::Result;
use mongodb::bson::Document;

use crate::node::{Kind, Node, SET, is_primary};

/// A running server. Dropping it ends it and removes its data.
#[derive(Debug)]
pub struct Mongod {
    node: Node,
    uri: String,
}

impl Mongod {
    /// Starts a replica set of one node on a free port of this host, and returns when it takes writes.
    ///
    /// # Errors
    /// A sentence about what is missing, or the end of the server's log.
    pub async fn start() -> Result<Self> {
        Self::start_with(&[]).await
    }

    /// Starts a server with more arguments for `mongod`, under which it still answers without TLS and without a password.
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

    /// The connection string.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The port on 127.0.0.1, the same for all of its life.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.node.port()
    }

    /// The server's process, while there is one.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.node.pid()
    }

    /// Stops the process without ending it: connections stay open and nothing answers.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn pause(&self) -> Result<()> {
        self.node.pause()
    }

    /// Lets a paused process go on.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn resume(&self) -> Result<()> {
        self.node.resume()
    }

    /// Ends the process as a crash would, and keeps the data for [`Self::restart`].
    ///
    /// # Errors
    /// If somebody else ended the shell that watches over the server.
    pub fn kill(&mut self) -> Result<()> {
        self.node.kill()
    }

    /// Starts again on the same port and data, and returns when the server takes writes.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn restart(&mut self) -> Result<()> {
        self.node.restart().await?;
        self.node.until("a primary", is_primary).await
    }

    /// Ends the server, and returns when its data is gone.
    ///
    /// # Errors
    /// If the data could not be removed.
    pub async fn stop(self) -> Result<()> {
        self.node.stop().await
    }
}
