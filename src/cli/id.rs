//! `twinsite id`: name, key, and what to paste at the other machine.

use std::path::Path;

use crate::api::NodeId;
use crate::config::{CONFIG_DEFAULT, Config, STATE_DIR_DEFAULT, host_name};
use crate::key;

/// Port that the examples use.
const PORT: u16 = 7447;

pub(crate) fn run(file: Option<&Path>, json: bool) -> anyhow::Result<()> {
    let config = match file {
        Some(file) => Some(Config::load(file)?),
        None if Path::new(CONFIG_DEFAULT).exists() => Some(Config::load(Path::new(CONFIG_DEFAULT))?),
        None => None,
    };
    let (name, state_dir) = match &config {
        Some(config) => (config.node.name.clone(), config.node.state_dir.clone()),
        None => (host_name(), STATE_DIR_DEFAULT.into()),
    };
    let id = NodeId { name, key: key::load_or_create(&state_dir)?.fingerprint() };
    if json {
        println!("{}", serde_json::to_string_pretty(&id)?);
        return Ok(());
    }
    let port = config.and_then(|c| c.receiver).map_or(PORT, |r| r.listen.port());
    println!("name  {}\nkey   {}\n", id.name, id.key);
    println!("To let this machine send its disks to another, paste at the other one:\n");
    println!("[[receiver.client]]\nname = \"{}\"\nkey = \"{}\"\n", id.name, id.key);
    println!("To let another machine send its disks here, paste there, in its [[group]]:\n");
    println!("peer = \"{}:{port}\"\npeer_key = \"{}\"", id.name, id.key);
    Ok(())
}
