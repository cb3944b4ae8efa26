//! The services of a cluster, each on a host of its own.
#![allow(clippy::print_stderr, reason = "what the services say belongs to a failed test's output")]

use super::network::Network;
use crate::processes::{LIMIT, model};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use unmask::local::connect;
use unmask::tls::ClientTlsArgs;
use unmask_proto::v1::admin_service_client::AdminServiceClient;
use unmask_proto::v1::inference_service_client::InferenceServiceClient;
use unmask_proto::v1::{GetStatusRequest, GetStatusResponse, GroupState, ListModelsRequest, WorkerState};

/// Numbers of hosts.
pub const ETCD: usize = 1;
pub const CONTROLLERS: [usize; 2] = [2, 3];
pub const GATEWAYS: [usize; 2] = [4, 5];
/// Those that bring the model.
pub const WORKERS: [usize; 2] = [6, 7];
/// Those of the pool: a group of two ranks, and a spare.
pub const POOL: [usize; 3] = [8, 9, 10];
pub const HOSTS: usize = 10;

/// Where every service of ours listens.
const PORT: u16 = 7700;
/// Groups that serve when all is well: a worker each, and one of the pool.
const GROUPS: u32 = 3;
/// Longest answer to a look.
const LOOK_LIMIT: Duration = Duration::from_millis(500);

fn address(host: usize) -> String {
    format!("{}:{PORT}", Network::address(host))
}

fn addresses(hosts: &[usize]) -> Vec<String> {
    hosts.iter().map(|host| address(*host)).collect()
}

/// A process that is started again when it ends.
struct Service {
    host: usize,
    program: &'static str,
    arguments: Vec<String>,
    /// `None` while it is to be down.
    child: Option<Child>,
}

impl Service {
    fn start(&mut self) {
        let mut child = Network::on(self.host, self.program)
            .args(&self.arguments)
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "error".into()))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (lines, host) = (BufReader::new(child.stderr.take().unwrap()).lines(), self.host);
        let show = self.program != "etcd";
        // Somebody must read on, or the service stops when the pipe is full.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok).filter(|_| show) {
                eprintln!("{host}: {line}");
            }
        });
        self.child = Some(child);
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A cluster over a network.
pub struct Hosts {
    pub network: Network,
    services: Vec<Service>,
    /// What ended though nobody killed it.
    pub ended: Vec<String>,
    _data: TempDir,
}

impl Hosts {
    /// Starts everything, and waits until it serves.
    pub async fn start() -> Hosts {
        let (network, data) = (Network::new(HOSTS), tempfile::tempdir().unwrap());
        let unmask = |host: usize, arguments: &[&str]| {
            let listen = ["--insecure", "--listen", &address(host)].map(Into::into);
            let arguments = arguments.iter().map(|argument| (*argument).to_owned()).chain(listen).collect();
            Service { host, program: env!("CARGO_BIN_EXE_unmask"), arguments, child: None }
        };
        let (control, model) = (addresses(&CONTROLLERS).join(","), model());
        let store = format!("etcd://{}:2379", Network::address(ETCD));
        let mut services = vec![etcd(data.path().to_str().unwrap())];
        services.extend(CONTROLLERS.map(|host| unmask(host, &["controller", "--store", &store])));
        services.extend(GATEWAYS.map(|host| unmask(host, &["gateway", "--controller", &control])));
        let worker = ["worker", "--threads", "1", "--controller", &control];
        let own = [&worker[..], &["--model", &model, "--dtype", "f32"]].concat();
        services.extend(WORKERS.map(|host| unmask(host, &own)));
        let pooled =
            |host: usize| unmask(host, &[&worker[..], &["--pool", "--worker-id", &format!("pool-{host}")]].concat());
        services.extend(POOL.map(pooled));
        services.iter_mut().for_each(Service::start);
        let mut hosts = Hosts { network, services, ended: Vec::new(), _data: data };
        hosts.apply(&control, &model).await;
        hosts.well(LIMIT).await;
        hosts
    }

    /// Wants a group of two ranks of the model that the workers bring.
    async fn apply(&mut self, control: &str, model: &str) {
        let yaml = format!("name: sdar\npath: {model}\ndtype: f32\ntensor_parallel: 2\nspares: 1\n");
        let applied = async {
            loop {
                let mut child = Command::new(env!("CARGO_BIN_EXE_unmask"))
                    .args(["apply", "-f", "-", "--controller", control])
                    .stdin(Stdio::piped())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                child.stdin.take().unwrap().write_all(yaml.as_bytes()).unwrap();
                if child.wait().unwrap().success() {
                    return;
                }
                self.tend();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(LIMIT, applied).await.expect("a controller leads");
    }

    pub fn endpoints() -> Vec<String> {
        addresses(&GATEWAYS)
    }

    fn service(&mut self, host: usize) -> &mut Service {
        self.services.iter_mut().find(|service| service.host == host).unwrap()
    }

    pub fn kill(&mut self, host: usize) {
        self.service(host).kill();
    }

    pub fn restart(&mut self, host: usize) {
        self.service(host).start();
    }

    pub fn signal(&mut self, host: usize, name: &str) {
        if let Some(child) = &self.service(host).child {
            assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
        }
    }

    /// Starts again what has ended by itself, as whoever runs services does.
    pub fn tend(&mut self) {
        for service in &mut self.services {
            if let Some(status) = service.child.as_mut().and_then(|child| child.try_wait().unwrap()) {
                self.ended.push(format!("the service of host {} ended by itself: {status}", service.host));
                service.start();
            }
        }
    }

    /// Waits until all is as it was without faults, and how long that takes.
    pub async fn well(&mut self, limit: Duration) -> Duration {
        let begun = std::time::Instant::now();
        loop {
            self.tend();
            let Err(problem) = look().await else { return begun.elapsed() };
            assert!(begun.elapsed() < limit, "not well after {limit:?}: {problem}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn etcd(data: &str) -> Service {
    let [clients, peers] = [2379, 2380].map(|port| format!("http://{}:{port}", Network::address(ETCD)));
    let cluster = format!("one={peers}");
    let arguments =
        ["--name", "one", "--data-dir", data, "--listen-client-urls", &clients, "--advertise-client-urls", &clients]
            .into_iter()
            .chain([
                "--listen-peer-urls",
                &peers,
                "--initial-advertise-peer-urls",
                &peers,
                "--initial-cluster",
                &cluster,
            ]);
    Service { host: ETCD, program: "etcd", arguments: arguments.map(Into::into).collect(), child: None }
}

/// What the controller that leads says.
pub async fn status() -> Option<GetStatusResponse> {
    for controller in addresses(&CONTROLLERS) {
        let asked = async {
            let mut client = AdminServiceClient::new(connect(&controller, &ClientTlsArgs::default()).ok()?);
            Some(client.get_status(GetStatusRequest {}).await.ok()?.into_inner())
        };
        if let Ok(Some(status)) = tokio::time::timeout(LOOK_LIMIT, asked).await {
            return Some(status);
        }
    }
    None
}

/// Whether all serve, by the controller and by both gateways; what does not.
async fn look() -> Result<(), String> {
    let status = status().await.ok_or("no controller leads")?;
    let members = status.members.iter().filter(|member| member.connected);
    let ready = members.filter(|member| [WorkerState::Ready, WorkerState::Spare].contains(&member.state())).count();
    if ready < WORKERS.len() + POOL.len() {
        return Err(format!("{ready} workers are ready: {:?}", status.members));
    }
    let model = status.models.first().ok_or("nothing is wanted")?;
    if model.groups.iter().any(|group| group.state() != GroupState::Serving) || model.spares.len() != 1 {
        return Err(format!("the pool: {model:?}"));
    }
    for gateway in addresses(&GATEWAYS) {
        let asked = async {
            let mut client = InferenceServiceClient::new(connect(&gateway, &ClientTlsArgs::default()).ok()?);
            let models = client.list_models(ListModelsRequest {}).await.ok()?.into_inner().models;
            Some(models.iter().map(|model| model.ready_groups).sum::<u32>())
        };
        let groups = tokio::time::timeout(LOOK_LIMIT, asked).await.ok().flatten();
        if groups != Some(GROUPS) {
            return Err(format!("gateway {gateway} has groups: {groups:?}"));
        }
    }
    Ok(())
}
