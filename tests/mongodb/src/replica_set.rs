//! Three `mongod` processes on this host that replicate each other, for tests of failovers.
//!
//! A node has a number from 0 to 2, in the order of the URI. Its port and its data stay the same
//! over restarts.

use anyhow::{Context, Result, ensure};
use mongodb::bson::{Bson, Document, doc};
use tokio::time::{Instant, sleep, timeout};

use crate::node::{ANSWER, Kind, Node, PATIENCE, POLL_INTERVAL, SET, is_primary, is_secondary};

/// A running replica set. Dropping this value ends all nodes and removes their data.
#[derive(Debug)]
pub struct ReplicaSet {
    nodes: [Node; 3],
    uri: String,
}

impl ReplicaSet {
    /// Starts three nodes on free ports of this host, and waits as [`Self::wait_for_all`] does.
    ///
    /// # Errors
    /// If there is no `mongod`, with advice; or if a server does not start, with the end of its
    /// log.
    pub async fn start() -> Result<Self> {
        let launch = || Node::launch(Kind::Member);
        let nodes: [Node; 3] = tokio::try_join!(launch(), launch(), launch())?.into();
        let ports = nodes.each_ref().map(Node::port);
        nodes[0].initiate(&ports, settings()).await?;
        let hosts = ports.map(|port| format!("127.0.0.1:{port}")).join(",");
        let set = Self { nodes, uri: format!("mongodb://{hosts}/?replicaSet={SET}") };
        set.wait_for_all().await?;
        Ok(set)
    }

    /// Returns the connection string, which names all three nodes.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Returns a connection string for one node only, whatever its role in the set.
    ///
    /// # Errors
    /// If there is no such node.
    pub fn node_uri(&self, node: usize) -> Result<String> {
        Ok(format!("mongodb://127.0.0.1:{}/?directConnection=true", self.node(node)?.port()))
    }

    /// Returns the process ids of the nodes that have not been killed.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.nodes.iter().filter_map(Node::pid).collect()
    }

    /// Returns the node that reports itself as the primary, if there is one. Of an old primary and
    /// its successor, returns the successor. A paused node has two seconds to answer.
    pub async fn primary(&self) -> Option<usize> {
        let [first, second, third] = &self.nodes;
        let hellos: [Document; 3] = tokio::join!(first.hello(), second.hello(), third.hello()).into();
        let primaries = hellos.iter().enumerate().filter(|(_, hello)| is_primary(hello));
        // Election ids rise from one election to the next.
        primaries.max_by_key(|(_, hello)| hello.get_object_id("electionId").ok()).map(|(node, _)| node)
    }

    /// Waits for a primary whose write a majority acknowledges.
    ///
    /// # Errors
    /// If there is no such primary for a minute.
    pub async fn wait_for_primary(&self) -> Result<usize> {
        self.primary_other_than(None).await
    }

    /// Waits until one node is the primary, the two others are secondaries, and all three
    /// acknowledge a write.
    ///
    /// # Errors
    /// If that takes more than a minute. It always does while a node is killed or paused.
    pub async fn wait_for_all(&self) -> Result<()> {
        for node in &self.nodes {
            node.until("a member in good health", is_well).await?;
        }
        let give_up = Instant::now() + PATIENCE;
        while !acknowledges(self.node(self.wait_for_primary().await?)?, 3).await {
            ensure!(Instant::now() < give_up, "the three nodes do not all acknowledge a write");
        }
        Ok(())
    }

    /// Makes the primary step down, and returns the next primary when it accepts writes.
    ///
    /// # Errors
    /// If no other node can be elected.
    pub async fn step_down(&self) -> Result<usize> {
        let old = self.wait_for_primary().await?;
        let step_down = doc! { "replSetStepDown": 60, "secondaryCatchUpPeriodSecs": 10 };
        self.node(old)?.ask(step_down, PATIENCE).await.context("the primary does not step down")?;
        let new = self.primary_other_than(Some(old)).await?;
        // Without this, the old primary cannot be elected for the rest of its minute. After two
        // step-downs, a killed primary would then have no successor.
        self.node(old)?.ask(doc! { "replSetFreeze": 0 }, PATIENCE).await?;
        Ok(new)
    }

    /// Kills the process of the primary, and returns its node. The data stays for
    /// [`Self::restart`].
    ///
    /// # Errors
    /// As [`Self::wait_for_primary`] and [`Self::kill`].
    pub async fn kill_primary(&mut self) -> Result<usize> {
        let primary = self.wait_for_primary().await?;
        self.kill(primary)?;
        Ok(primary)
    }

    /// Kills the process of a node. Its data stays for [`Self::restart`].
    ///
    /// # Errors
    /// If there is no such node, or if its guardian has been killed.
    pub fn kill(&mut self, node: usize) -> Result<()> {
        self.node_mut(node)?.kill()
    }

    /// Starts a node again, and returns when it is a secondary, or the primary if the others need
    /// it for a majority. The node may still lag; see [`Self::wait_for_all`].
    ///
    /// # Errors
    /// If there is no such node, or as [`Self::start`].
    pub async fn restart(&mut self, node: usize) -> Result<()> {
        let node = self.node_mut(node)?;
        node.restart().await?;
        node.until("a member in good health", is_well).await
    }

    /// Suspends the process of a node with SIGSTOP. Its connections stay open, and it answers no
    /// command.
    ///
    /// # Errors
    /// If there is no such node or process.
    pub fn pause(&self, node: usize) -> Result<()> {
        self.node(node)?.pause()
    }

    /// Continues a paused node. If it was the primary, it still reports itself as the primary until
    /// it learns of the new one.
    ///
    /// # Errors
    /// If there is no such node or process.
    pub fn resume(&self, node: usize) -> Result<()> {
        self.node(node)?.resume()
    }

    /// Ends all nodes, and returns when their data is removed.
    ///
    /// # Errors
    /// If some data could not be removed.
    pub async fn stop(self) -> Result<()> {
        let [first, second, third] = self.nodes;
        tokio::try_join!(first.stop(), second.stop(), third.stop())?;
        Ok(())
    }

    async fn primary_other_than(&self, old: Option<usize>) -> Result<usize> {
        let [first, second, third] = &self.nodes;
        // The nodes are polled side by side, so that a paused node does not delay the others.
        let elected = async {
            tokio::select! {
                () = leads(first), if old != Some(0) => 0,
                () = leads(second), if old != Some(1) => 1,
                () = leads(third), if old != Some(2) => 2,
            }
        };
        timeout(PATIENCE, elected).await.context("no node becomes the primary")
    }

    fn node(&self, node: usize) -> Result<&Node> {
        self.nodes.get(node).with_context(|| format!("there is no node {node}"))
    }

    fn node_mut(&mut self, node: usize) -> Result<&mut Node> {
        self.nodes.get_mut(node).with_context(|| format!("there is no node {node}"))
    }
}

/// Returns settings with which a failover takes 1 to 2 s instead of about 12 s, even if a node
/// hangs.
fn settings() -> Document {
    doc! {
        "electionTimeoutMillis": 1000,
        "heartbeatIntervalMillis": 250,
        // A new primary first fetches the writes that it lacks from other nodes. It waits for a
        // hanging node until this timeout, and no longer than the catch-up timeout.
        "heartbeatTimeoutSecs": 1,
        "catchUpTimeoutMillis": 1000,
    }
}

fn is_well(hello: &Document) -> bool {
    is_primary(hello) || is_secondary(hello)
}

/// Waits until the node is the primary and a majority acknowledges its writes.
async fn leads(node: &Node) {
    // The node is asked for its role first. A write that waits in a paused primary would take
    // effect when the node continues, and would then be rolled back.
    while !is_primary(&node.hello().await) || !acknowledges(node, "majority").await {
        sleep(POLL_INTERVAL).await;
    }
}

/// Returns whether a write to this node is acknowledged by `nodes`: a number of nodes, or
/// `majority`. The write is a note in the oplog, and does not change data.
async fn acknowledges(node: &Node, nodes: impl Into<Bson>) -> bool {
    let enough = doc! { "w": nodes.into(), "wtimeout": 1000 };
    let note =
        doc! { "appendOplogNote": 1, "data": { "note": "is there a primary" }, "writeConcern": enough };
    node.ask(note, ANSWER).await.is_ok_and(|answer| !answer.contains_key("writeConcernError"))
}
