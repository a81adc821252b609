//! The control socket: HTTP and JSON. Translates requests to calls of the [`Node`] and nothing else.

use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;

use super::adopt::AdoptRefused;
use super::drills::{DRILLS_MAX, DrillRefused};
use super::exports::ExportError;
use super::{Node, RequestError};
use crate::api::{
    AdoptRequest, AdoptStatus, ApiError, DrillEnd, DrillEnded, DrillHold, DrillList, DrillRequest, DrillResults, DrillStarted,
    FailoverDone, FailoverPlan, FailoverRequest, ForkList, ForkRemoval, HandbackProgress, HandbackRequest, HookRuns, ListedFork,
    NameRequest, Named, NodeId, NodeStatus, PlannedHandback, Points, Refused, SwitchoverRequest, Verification, VerifyRequest,
};
use crate::hooks::Transition;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupQuery {
    group: String,
}

/// What a failover would do, or a switchover.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanQuery {
    group: String,
    point: Option<String>,
    #[serde(default)]
    switchover: bool,
}

/// Of all groups, or of one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupsQuery {
    group: Option<String>,
}

/// All routes.
pub(crate) fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route("/v1/id", get(id))
        .route("/v1/status", get(status))
        .route("/v1/points", get(points))
        .route("/v1/names", post(name))
        .route("/v1/forks", get(forks))
        .route("/v1/forks/remove", post(remove_fork))
        .route("/v1/failover", get(plan).post(failover))
        .route("/v1/hooks", get(hooks))
        .route("/v1/verify", get(verification).post(verify))
        .route("/v1/handback", get(handback).post(begin_handback))
        .route("/v1/handback/plan", post(handback_plan))
        .route("/v1/switchover", post(switchover))
        .route("/v1/adopt", get(adoption).post(adopt))
        .route("/v1/drills", get(drills))
        .route("/v1/drill", post(drill))
        .route("/v1/drill/hold", post(hold))
        .route("/v1/drill/end", post(end_drill))
        .route("/v1/drill/results", get(drill_results))
        .fallback(async || (StatusCode::NOT_FOUND, answer("no such path; this node speaks /v1".to_owned())))
        .with_state(node)
}

fn answer(error: String) -> Json<ApiError> {
    Json(ApiError { error, refused: None })
}

impl IntoResponse for RequestError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NoReceiver
            | Self::UnknownGroup { .. }
            | Self::AmbiguousGroup { .. }
            | Self::UnknownPoint { .. }
            | Self::UnknownName { .. }
            | Self::UnknownPrimary { .. }
            | Self::CopyOnly { .. }
            | Self::NeverHandedBack { .. }
            | Self::Drill(DrillRefused::Unknown { .. } | DrillRefused::NoPoint(_))
            | Self::Adopt(AdoptRefused::Never { .. })
            | Self::NeverVerified { .. } => StatusCode::NOT_FOUND,
            Self::NoPoint { .. }
            | Self::Name(_)
            | Self::Fork(_)
            | Self::AlreadyActive { .. }
            | Self::PrimaryAlive { .. }
            | Self::ThirdSite { .. }
            | Self::CopyFollows { .. }
            | Self::NotRunning { .. }
            | Self::Verify(_)
            | Self::Handback(_)
            | Self::Exports(ExportError::NameTaken { .. } | ExportError::Mixed { .. }) => StatusCode::CONFLICT,
            Self::Drill(DrillRefused::Name { .. } | DrillRefused::NoUser { .. } | DrillRefused::PointAndFork) => {
                StatusCode::BAD_REQUEST
            }
            Self::Drill(DrillRefused::Folder { .. }) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Drill(_) | Self::Adopt(AdoptRefused::Running { .. } | AdoptRefused::Stopping) => StatusCode::CONFLICT,
            Self::Adopt(_) => StatusCode::BAD_REQUEST,
            Self::Export { .. } | Self::Query(_) | Self::Body(_) => StatusCode::BAD_REQUEST,
            Self::Hook(_) => StatusCode::CONFLICT,
            Self::Exports(_) | Self::Record(_) | Self::Receiver(_) | Self::Aborted => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let refused = match self {
            Self::PrimaryAlive { .. } => Some(Refused::PrimaryAlive),
            Self::ThirdSite { .. } => Some(Refused::ThirdSite),
            _ => None,
        };
        (status, Json(ApiError { error: self.to_string(), refused })).into_response()
    }
}

async fn id(State(node): State<Arc<Node>>) -> Json<NodeId> {
    Json(node.id.clone())
}

async fn status(State(node): State<Arc<Node>>) -> Json<NodeStatus> {
    Json(node.status().await)
}

async fn hooks(State(node): State<Arc<Node>>) -> Json<HookRuns> {
    Json(node.hook_runs())
}

async fn points(
    State(node): State<Arc<Node>>,
    query: Result<Query<GroupQuery>, QueryRejection>,
) -> Result<Json<Points>, RequestError> {
    let Query(query) = query?;
    Ok(Json(node.points(&query.group).await?))
}

async fn name(
    State(node): State<Arc<Node>>,
    body: Result<Json<NameRequest>, JsonRejection>,
) -> Result<Json<Named>, RequestError> {
    let Json(request) = body?;
    let copies = node.receiving()?;
    Ok(Json(copies.name(&copies.find(&request.group).await?, &request).await?))
}

async fn forks(
    State(node): State<Arc<Node>>,
    query: Result<Query<GroupsQuery>, QueryRejection>,
) -> Result<Json<ForkList>, RequestError> {
    let Query(query) = query?;
    Ok(Json(node.receiving()?.forks(query.group.as_deref()).await?))
}

async fn remove_fork(
    State(node): State<Arc<Node>>,
    body: Result<Json<ForkRemoval>, JsonRejection>,
) -> Result<Json<ListedFork>, RequestError> {
    let Json(removal) = body?;
    // A task of its own: what was begun is brought to its end.
    let running = tokio::spawn(async move { node.receiving()?.remove_fork(&removal).await });
    Ok(Json(running.await.map_err(|_| RequestError::Aborted)??))
}

async fn plan(
    State(node): State<Arc<Node>>,
    query: Result<Query<PlanQuery>, QueryRejection>,
) -> Result<Json<FailoverPlan>, RequestError> {
    let Query(query) = query?;
    let transition = if query.switchover { Transition::Switchover } else { Transition::Failover };
    Ok(Json(node.failover_plan(transition, &query.group, query.point.as_deref()).await?))
}

async fn verification(
    State(node): State<Arc<Node>>,
    query: Result<Query<GroupQuery>, QueryRejection>,
) -> Result<Json<Verification>, RequestError> {
    let Query(query) = query?;
    Ok(Json(node.verification(&query.group).await?))
}

async fn verify(
    State(node): State<Arc<Node>>,
    body: Result<Json<VerifyRequest>, JsonRejection>,
) -> Result<Json<Verification>, RequestError> {
    let Json(request) = body?;
    Ok(Json(node.verify(&request.group).await?))
}

async fn handback(
    State(node): State<Arc<Node>>,
    query: Result<Query<GroupQuery>, QueryRejection>,
) -> Result<Json<HandbackProgress>, RequestError> {
    let Query(query) = query?;
    Ok(Json(node.handback(&query.group).await?))
}

async fn handback_plan(
    State(node): State<Arc<Node>>,
    body: Result<Json<HandbackRequest>, JsonRejection>,
) -> Result<Json<PlannedHandback>, RequestError> {
    let Json(request) = body?;
    Ok(Json(node.handback_plan(&request).await?))
}

async fn begin_handback(
    State(node): State<Arc<Node>>,
    body: Result<Json<HandbackRequest>, JsonRejection>,
) -> Result<Json<HandbackProgress>, RequestError> {
    let Json(request) = body?;
    Ok(Json(node.begin_handback(&request).await?))
}

async fn switchover(
    State(node): State<Arc<Node>>,
    body: Result<Json<SwitchoverRequest>, JsonRejection>,
) -> Result<Json<FailoverDone>, RequestError> {
    let Json(request) = body?;
    // As below.
    let running = tokio::spawn(async move { node.switchover(&request).await });
    Ok(Json(running.await.map_err(|_| RequestError::Aborted)??))
}

async fn failover(
    State(node): State<Arc<Node>>,
    body: Result<Json<FailoverRequest>, JsonRejection>,
) -> Result<Json<FailoverDone>, RequestError> {
    let Json(request) = body?;
    // A task of its own: a command line that goes away must not stop a failover half way.
    let running = tokio::spawn(async move { node.failover(&request).await });
    Ok(Json(running.await.map_err(|_| RequestError::Aborted)??))
}

async fn drills(State(node): State<Arc<Node>>) -> Json<DrillList> {
    Json(DrillList { drills: node.drills.status(), drills_max: DRILLS_MAX as u64 })
}

async fn drill(
    State(node): State<Arc<Node>>,
    body: Result<Json<DrillRequest>, JsonRejection>,
) -> Result<Json<DrillStarted>, RequestError> {
    let Json(request) = body?;
    // A task of its own: a command line that goes away must not leave half a drill.
    let running = tokio::spawn(async move { node.start_drill(&request).await });
    Ok(Json(running.await.map_err(|_| RequestError::Aborted)??))
}

/// No task of its own: when the connection ends this is dropped, and with it the drill.
async fn hold(
    State(node): State<Arc<Node>>,
    body: Result<Json<DrillHold>, JsonRejection>,
) -> Result<Json<DrillEnded>, RequestError> {
    let Json(hold) = body?;
    Ok(Json(node.hold_drill(&hold).await?))
}

async fn end_drill(
    State(node): State<Arc<Node>>,
    body: Result<Json<DrillEnd>, JsonRejection>,
) -> Result<Json<DrillEnded>, RequestError> {
    let Json(end) = body?;
    let running = tokio::spawn(async move { node.end_drill(end).await });
    Ok(Json(running.await.map_err(|_| RequestError::Aborted)??))
}

async fn drill_results(
    State(node): State<Arc<Node>>,
    query: Result<Query<GroupQuery>, QueryRejection>,
) -> Result<Json<DrillResults>, RequestError> {
    let Query(query) = query?;
    Ok(Json(node.drill_results(&query.group).await?))
}

async fn adopt(
    State(node): State<Arc<Node>>,
    body: Result<Json<AdoptRequest>, JsonRejection>,
) -> Result<Json<AdoptStatus>, RequestError> {
    let Json(request) = body?;
    Ok(Json(node.adopt(&request).await?))
}

async fn adoption(
    State(node): State<Arc<Node>>,
    query: Result<Query<GroupQuery>, QueryRejection>,
) -> Result<Json<AdoptStatus>, RequestError> {
    let Query(query) = query?;
    Ok(Json(node.adoption(&query.group)?))
}
