//! Three `mongod`s on this host that replicate each other, for tests of what a failover does to those who use them.
//!
//! A node is named by its number, 0 to 2, in the order of the URI; its port and its data stay the same.

use anyhow::{Context, Result, ensure};
use mongodb::bson::{Bson, Document, doc};
use tokio::time::{Instant, sleep, timeout};

use crate::node::{ANSWER, Kind, LOOK, Node, PATIENCE, SET, is_primary, is_secondary};

/// A running set. Dropping it ends it and removes its data.
#[derive(Debug)]
pub struct ReplicaSet {
    nodes: [Node; 3],
    uri: String,
}

impl ReplicaSet {
    /// Starts three nodes on free ports of this host, and returns as [`Self::wait_for_all`] does.
    ///
    /// # Errors
    /// A sentence about what is missing, or the end of a server's log.
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

    /// The connection string, which names all three.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The connection string of one node, whatever it is in the set at the time.
    ///
    /// # Errors
    /// If there is no such node.
    pub fn node_uri(&self, node: usize) -> Result<String> {
        Ok(format!("mongodb://127.0.0.1:{}/?directConnection=true", self.node(node)?.port()))
    }

    /// The processes of the nodes that have not been killed.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.nodes.iter().filter_map(Node::pid).collect()
    }

    /// The node that says that it is the primary, if one does. Of two, of which one has not heard yet that it no longer
    /// is, the one that was elected later. A paused node is given two seconds to answer.
    pub async fn primary(&self) -> Option<usize> {
        let [first, second, third] = &self.nodes;
        let hellos: [Document; 3] = tokio::join!(first.hello(), second.hello(), third.hello()).into();
        let primaries = hellos.iter().enumerate().filter(|(_, hello)| is_primary(hello));
        // Election ids rise from one election to the next.
        primaries.max_by_key(|(_, hello)| hello.get_object_id("electionId").ok()).map(|(node, _)| node)
    }

    /// Waits for a primary that a majority follows: it has acknowledged a write.
    ///
    /// # Errors
    /// If there is none for a minute.
    pub async fn wait_for_primary(&self) -> Result<usize> {
        self.primary_other_than(None).await
    }

    /// Waits until one node is the primary, the two others are secondaries, and all three acknowledge a write.
    ///
    /// # Errors
    /// If that takes more than a minute, as it does while a node is killed or paused.
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

    /// Has the primary step down in good order, and returns the next one when it takes writes.
    ///
    /// # Errors
    /// If no other node can be elected.
    pub async fn step_down(&self) -> Result<usize> {
        let old = self.wait_for_primary().await?;
        let step_down = doc! { "replSetStepDown": 60, "secondaryCatchUpPeriodSecs": 10 };
        self.node(old)?.ask(step_down, PATIENCE).await.context("the primary does not step down")?;
        let new = self.primary_other_than(Some(old)).await?;
        // Else it is no candidate for the rest of its minute, and after two such steps a killed primary has no successor.
        self.node(old)?.ask(doc! { "replSetFreeze": 0 }, PATIENCE).await?;
        Ok(new)
    }

    /// Ends the primary's process as a crash would, and gives the node. Its data stays for [`Self::restart`].
    ///
    /// # Errors
    /// As [`Self::wait_for_primary`] and [`Self::kill`].
    pub async fn kill_primary(&mut self) -> Result<usize> {
        let primary = self.wait_for_primary().await?;
        self.kill(primary)?;
        Ok(primary)
    }

    /// Ends the process of a node as a crash would. Its data stays for [`Self::restart`].
    ///
    /// # Errors
    /// If there is no such node, or somebody else ended the shell that watches over it.
    pub fn kill(&mut self, node: usize) -> Result<()> {
        self.node_mut(node)?.kill()
    }

    /// Starts a node again, and returns when it is a secondary: or the primary, if the others cannot do without it.
    /// It may lag then; see [`Self::wait_for_all`].
    ///
    /// # Errors
    /// If there is no such node, or as [`Self::start`].
    pub async fn restart(&mut self, node: usize) -> Result<()> {
        let node = self.node_mut(node)?;
        node.restart().await?;
        node.until("a member in good health", is_well).await
    }

    /// Stops the process of a node without ending it: connections stay open and nothing answers.
    ///
    /// # Errors
    /// If there is no such node or process.
    pub fn pause(&self, node: usize) -> Result<()> {
        self.node(node)?.pause()
    }

    /// Lets a paused node go on. If it was the primary it still says so until it hears of another.
    ///
    /// # Errors
    /// If there is no such node or process.
    pub fn resume(&self, node: usize) -> Result<()> {
        self.node(node)?.resume()
    }

    /// Ends all nodes, and returns when their data is gone.
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
        // Side by side: a paused node, which does not answer, holds up nobody.
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

/// Failovers in a second or two instead of a dozen, and no wait for a node that hangs.
fn settings() -> Document {
    doc! {
        "electionTimeoutMillis": 1000,
        "heartbeatIntervalMillis": 250,
        // Until a node has missed this, a new primary waits for what it may have to give, up to the catch-up time.
        "heartbeatTimeoutSecs": 1,
        "catchUpTimeoutMillis": 1000,
    }
}

fn is_well(hello: &Document) -> bool {
    is_primary(hello) || is_secondary(hello)
}

/// Returns once the node is the primary of a majority.
async fn leads(node: &Node) {
    // Asked first: a write that waits in a paused primary would be made when that is resumed, only to be rolled back.
    while !is_primary(&node.hello().await) || !acknowledges(node, "majority").await {
        sleep(LOOK).await;
    }
}

/// Whether the node takes a write and gets it to as many nodes. The write is a remark in the oplog, not in the data.
async fn acknowledges(node: &Node, nodes: impl Into<Bson>) -> bool {
    let enough = doc! { "w": nodes.into(), "wtimeout": 1000 };
    let note =
        doc! { "appendOplogNote": 1, "data": { "note": "is there a primary" }, "writeConcern": enough };
    node.ask(note, ANSWER).await.is_ok_and(|answer| !answer.contains_key("writeConcernError"))
}
